"""Which tensors the tests load, and in which files, written by tensorizer, they stand."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tensorizer import EncryptionParams, TensorSerializer

from tensorserve.loading.tuning import DEFAULTS
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access

KEY = bytes(range(32))
MIB = 1024**2
# What a file is sealed in, by name; None: not at all. tensorizer's own size is 2 MiB.
CHUNKS: dict[str, int | None] = {
    "plain": None,
    "2MiB": 2 * MIB,
    "3MiB": 3 * MIB,  # does not divide a part
    "64MiB": 64 * MIB,
    "whole": 1024 * MIB,  # one tag for a tensor
}
DTYPES = (
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 "
    "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
).split()

Tensors = dict[str, torch.Tensor]


def noise(count: int, seed: int = 7) -> torch.Tensor:
    """Random bytes, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(generator=generator)
    return words.view(torch.uint8)[:count].clone()


def sizes() -> Tensors:
    """Around each boundary of the way: small, part, job; and a few parts with a rest."""
    counts = [
        1,
        3,
        1000,
        DEFAULTS.small_bytes,
        DEFAULTS.small_bytes + 1,
        DEFAULTS.part_bytes - 1,
        DEFAULTS.part_bytes,
        DEFAULTS.part_bytes + 1,
    ]
    # The last is more than the tests with the least `ahead` hold (16 MiB).
    counts += [DEFAULTS.job_bytes, 5 * DEFAULTS.part_bytes + 3, 9 * DEFAULTS.part_bytes]
    return {f"t{number}": noise(count, number) for number, count in enumerate(counts)}


def dtypes() -> Tensors:
    """One small and one larger tensor of each dtype that tensorizer writes: of 8 bytes an element
    and more, it is longer than a part."""
    made = {}
    for number, name in enumerate(DTYPES):
        dtype = getattr(torch, name)
        for shape in ((3, 5, 7), (512, 550)):
            count = shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)
            values = noise(count * dtype.itemsize, number)
            if name == "bool":
                values &= 1
            made[f"{name}-{len(shape)}"] = values.view(dtype).reshape(shape)
    made["scalar"] = torch.tensor(2.5)
    return made


def many() -> Tensors:
    """Many small ones: more than go into a job."""
    return {f"t{number}": noise(1 + number * 7 % 3000, number) for number in range(600)}


def empty() -> Tensors:
    """Some without any bytes. tensorizer can neither seal them nor read bfloat16 ones."""
    return {
        "first": torch.empty(0),
        "a": noise(1000),
        "b": torch.empty((3, 0), dtype=torch.float16),
        "c": noise(3 * DEFAULTS.part_bytes, 3),
        "last": torch.empty((0, 5), dtype=torch.int8),
    }


def large() -> Tensors:
    """One that is larger than the ring of these tests (64 MiB), and one behind it."""
    return {"large": noise(66 * MIB + 17), "after": noise(5)}


def equal_ones() -> Tensors:
    """Twenty-four of 4 MiB: memory of one is used again for another."""
    return {f"t{number}": noise(4 * MIB, number) for number in range(24)}


def few() -> Tensors:
    """Twelve of 4 MiB, for loads that fail in the middle."""
    return {f"t{number}": noise(4 * MIB, number) for number in range(12)}


def smallest() -> Tensors:
    """A part, a part and a rest, next to nothing."""
    return {"part": noise(2**21, 1), "rest": noise(2**21 + 17, 2), "little": noise(3, 3)}


CONTENTS: dict[str, Callable[[], Tensors]] = {
    made.__name__: made for made in (sizes, dtypes, many, empty, large, equal_ones, few, smallest)
}


class Files:
    """`path(content, chunk)` writes a file when it is first asked for; names as above."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tensors: dict[str, Tensors] = {}

    def tensors(self, content: str) -> Tensors:
        """What was written; in host memory."""
        if content not in self._tensors:
            self._tensors[content] = CONTENTS[content]()
        return self._tensors[content]

    def path(self, content: str, chunk: str) -> Path:
        """The file; with another chunk than "plain" it is sealed with KEY."""
        path = self._directory / f"{content}-{chunk}.tensors"
        if not path.exists():
            half = path.with_suffix(".half")
            write(half, self.tensors(content), chunk)
            half.rename(path)
        return path

    def packed(self, content: str) -> Path:
        """The same, sealed with KEY by `tensorserve pack`."""
        directory = self._directory / f"{content}-packed"
        if not directory.exists():
            source = self._directory / f"{content}-source"
            source.mkdir()
            (source / "config.json").write_text("{}")
            save_file(self.tensors(content), source / "model.safetensors")
            key = Secret(base64.b64encode(KEY).decode())
            pack(source, str(directory), access=Access(), key=key)
        return directory / "model.tensors"


def write(path: Path, tensors: Tensors, chunk: str) -> None:
    """By tensorizer itself."""
    size = CHUNKS[chunk]
    serializer = TensorSerializer(
        str(path), encryption=None if size is None else EncryptionParams(key=KEY)
    )
    if size is not None:
        # Its default, 2 MiB, has no public setting; older versions and other writers had others.
        serializer._crypt_chunk_size = size
    serializer.write_state_dict(dict(tensors))
    serializer.close()
