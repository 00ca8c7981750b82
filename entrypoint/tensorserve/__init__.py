"""tensorserve: encrypted Tensorizer models, served by vLLM, with a start one can watch."""

__version__ = "0.1.0"
