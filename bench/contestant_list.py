"""Which contestants are in the table, with which settings and compared with which base?"""

from __future__ import annotations

from bench.running import Contestant

_LOCAL = ("file-warm", "file-cold")
_S3 = ("s3", "s3-like")
# The likeliest best first: a trial that takes much longer than the best so far is stopped.
_READERS = ("readers", (8, 4, 16, 2, 32, 1))
_CONCURRENCY = ("concurrency", (16, 8, 32, 64))
_CONNECTIONS = ("connections", (16, 32, 8, 64, 4, 2))

# The bases of encrypted and of plain loads; a safetensors file is a plain load.
_SEALED, _OPEN = "tensorizer-encrypted", "tensorizer-plain"

CONTESTANTS = (
    Contestant("ours-encrypted", "this loader, encrypted", "ours", "encrypted", base=_SEALED),
    Contestant(
        _SEALED, "tensorizer, encrypted, default", "tensorizer_reader", "encrypted", base=_SEALED
    ),
    Contestant(
        "tensorizer-encrypted-best",
        "tensorizer, encrypted, best",
        "tensorizer_reader",
        "encrypted",
        sweep=_READERS,
        base=_SEALED,
    ),
    # tensorizer's reader with this package's sources: it differs from the line above in the
    # transport only.
    Contestant(
        "reference-encrypted",
        "TENSORSERVE_LOADER=reference, encrypted",
        "ours",
        "encrypted",
        options={"loader": "reference"},
        base=_SEALED,
    ),
    Contestant("ours-plain", "this loader, plain", "ours", "plain", base=_OPEN),
    Contestant(_OPEN, "tensorizer, plain, default", "tensorizer_reader", "plain", base=_OPEN),
    Contestant(
        "tensorizer-plain-best",
        "tensorizer, plain, best",
        "tensorizer_reader",
        "plain",
        sweep=_READERS,
        base=_OPEN,
    ),
    Contestant(
        "reference-plain",
        "TENSORSERVE_LOADER=reference, plain",
        "ours",
        "plain",
        options={"loader": "reference"},
        base=_OPEN,
    ),
    Contestant(
        "runai",
        "Run:ai streamer, plain, default",
        "runai",
        "safetensors",
        base=_OPEN,
        places=_LOCAL + _S3,
    ),
    Contestant(
        "runai-best",
        "Run:ai streamer, plain, best",
        "runai",
        "safetensors",
        sweep=_CONCURRENCY,
        base=_OPEN,
        places=_LOCAL + _S3,
    ),
    Contestant(
        "safetensors",
        "safetensors load_file (mapped), plain",
        "safetensors_file",
        "safetensors",
        base=_OPEN,
        places=_LOCAL,
    ),
    Contestant(
        "safetensors-download",
        "boto3 download, then load_file, plain",
        "safetensors_file",
        "safetensors",
        base=_OPEN,
        places=_S3,
    ),
    Contestant(
        "link",
        "our client alone (bytes only), best",
        "ours",
        "encrypted",
        options={"bytes_only": True},
        sweep=_CONNECTIONS,
        base=_SEALED,
        moves_only=True,
    ),
    # With 16 connections of 10 MB/s each, the link is the limit, not the processor.
    Contestant(
        "ours-16",
        "this loader, encrypted, 16 connections",
        "ours",
        "encrypted",
        options={"connections": 16},
        base=_SEALED,
        places=("s3-like",),
    ),
    Contestant(
        "link-16",
        "our client alone (bytes only), 16 connections",
        "ours",
        "encrypted",
        options={"bytes_only": True, "connections": 16},
        base=_SEALED,
        places=("s3-like",),
        moves_only=True,
    ),
)
