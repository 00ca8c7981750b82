"""Do files that an engine has written hold weights of its model?

Windows of 32 bytes are taken from every tensor's plaintext at a fixed distance, and looked for at
every offset of every file. So a file is found that has as many consecutive bytes of a tensor as
that distance and one window: 4 KiB, more for models above 4 GiB. Not found are shorter pieces,
windows of few different bytes (zeros, ones), and weights in another form (converted, transposed,
compressed). Compiled code has no such data: vLLM passes weights to it as arguments. The scan is for
the day when a library writes some of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tensorserve.bundle.tensors_file import OpenTensors
from tensorserve.errors import ConfigurationError
from tensorserve.format import read_tensor

WEIGHT_SUFFIXES = (".safetensors", ".tensors", ".gguf", ".pth")
WINDOW = 32
_DISTANCE = 4096
_MOST_WINDOWS = 2**20
# Fewer in a window say nothing: tables of constants have the same.
_DIFFERENT_BYTES = 9
_BLOCK = 4 * 1024**2
_WORD = 8
_TABLE_BITS = 22
# Knuth's multiplicative hash (The Art of Computer Programming, vol. 3, 6.4).
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class WeightScan:
    """Windows of one model's tensors."""

    def __init__(self, data_bytes: int) -> None:
        """`data_bytes`: of all tensors together, from which the distance follows."""
        least = -(-data_bytes // _MOST_WINDOWS)
        self.distance = max(_DISTANCE, -(-least // WINDOW) * WINDOW)
        self._found: list[Any] = []
        self._table: Any = None

    def add(self, data: bytes | bytearray | memoryview) -> None:
        """Takes windows of the plaintext of one tensor."""
        flat = np.frombuffer(data, np.uint8)
        starts = np.arange(0, len(flat) - WINDOW + 1, self.distance)
        windows = flat[starts[:, None] + np.arange(WINDOW)]
        ordered = np.sort(windows, axis=1)
        different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
        self._found.append(windows[different >= _DIFFERENT_BYTES])
        self._table = None

    def refuse(self, root: Path, names: Iterable[str]) -> None:
        """Raises ConfigurationError, naming the file, if one of `names` below `root` has some."""
        self._prepare()
        for name in names:
            if name.endswith(WEIGHT_SUFFIXES) or self._in_file(root / name):
                raise ConfigurationError(
                    f"{name}, which the engine wrote into its caches, holds weights of the model: "
                    "nothing was uploaded.",
                    hint="Please report it, with the model and the flags.",
                )

    def _prepare(self) -> None:
        if self._table is not None:
            return
        windows = np.concatenate(self._found or [np.zeros((0, WINDOW), np.uint8)])
        self._windows = {window.tobytes() for window in windows}
        words = np.ascontiguousarray(windows[:, :_WORD]).view("<u8").reshape(-1)
        self._words = np.unique(words)
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[_slots(self._words)] = True

    def _in_file(self, path: Path) -> bool:
        with path.open("rb") as file:
            held = b""
            while block := file.read(_BLOCK):
                data = held + block
                if self._in_data(data):
                    return True
                held = data[-(WINDOW - 1) :]
        return False

    def _in_data(self, data: bytes) -> bool:
        """Whether a window begins at any offset of `data`."""
        for shift in range(_WORD):
            count = (len(data) - shift) // _WORD
            if count <= 0:
                break
            words = np.frombuffer(data, "<u8", count, shift)
            (near,) = np.nonzero(self._table[_slots(words)])
            near = near[np.isin(words[near], self._words)]
            for place in near.tolist():
                at = shift + place * _WORD
                if data[at : at + WINDOW] in self._windows:
                    return True
        return False


def _slots(words: Any) -> Any:
    return (words * _FACTOR) >> np.uint64(64 - _TABLE_BITS)


def scan_for(opened: Iterable[OpenTensors]) -> WeightScan:
    """The scan for the weights in .tensors files. Reads all of them: memory for one tensor.

    Raises CorruptError and the sources' errors.
    """
    files = tuple(opened)
    scan = WeightScan(sum(one.index.data_bytes for one in files))
    for one in files:
        for record in one.index.tensors:
            if record.length >= WINDOW:
                scan.add(read_tensor(one.source, record, one.index, one.key, verify=False))
    return scan
