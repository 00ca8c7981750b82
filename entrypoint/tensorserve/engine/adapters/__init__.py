"""How are LoRA adapters found, checked and held while the engine serves (docs/adapters.md)?"""
