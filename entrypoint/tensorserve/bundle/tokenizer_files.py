"""Which of a model's files make up its tokenizer, by their names?

The names are those that transformers' AutoTokenizer and mistral-common look for. Without these
files some tokenizer classes raise an error; others (BERT, GPT-2, Qwen2) silently make a tokenizer
with an empty vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Collection

TOKENIZERS = "tokenizer.json, *.model, tekken.json, vocab.txt, or vocab.json and merges.txt"
_WHOLE = re.compile(
    # transformers: tokenizer.json, also with a version (tokenizer.4.0.0.json).
    r"tokenizer(\.\d[\w.]*)?\.json"
    # SentencePiece, with any name; tiktoken; Mistral's, with a version (tokenizer.model.v3).
    r"|[^/]*\.(model|spm|tiktoken)|[^/]*\.model\.v\d[\w.]*"
    r"|tekken\.json|vocab\.txt|vocab\.tiktoken"
)
# Byte-pair encoding needs both files.
_PAIRS = (("vocab.json", "merges.txt"),)


def is_tokenizer_file(name: str) -> bool:
    """Whether `name`, relative to the model's directory, is part of a tokenizer."""
    return _WHOLE.fullmatch(name) is not None or any(name in pair for pair in _PAIRS)


def tokenizer_in(names: Collection[str]) -> str | None:
    """The tokenizer file (or pair of files) among `names`, for messages; None if there is none.

    `names` are relative to the model's directory.
    """
    for name in sorted(names, key=lambda name: (name != "tokenizer.json", name)):
        if _WHOLE.fullmatch(name):
            return name
    for pair in _PAIRS:
        if set(pair) <= set(names):
            return " and ".join(pair)
    return None
