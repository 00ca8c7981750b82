"""How is the model's key wrapped, and who unwraps it?"""
