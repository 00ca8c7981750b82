"""One kind of the matrix: packed, verified, served, and compared with stock vLLM; what was seen."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forked import ForkedEngine, WarmVllm, ours, stock
from matrix_asking import ASKS, Refused
from matrix_models import Maker
from matrix_page import DIFFERS, EQUAL, REFUSED, STOCK_REFUSES, Seen
from running import BIN, clean_environment

from tensorserve.config.access import access_for
from tensorserve.config.settings import Settings
from tensorserve.format import read_index
from tensorserve.sources import open_source

# Of the lines that vLLM ends with: those that may say why, and those that say that another does.
_REASON = re.compile(r"^.*?((?:[\w.]*(?:Error|Exception): |Value error, ).*)$")
_ANOTHERS = (
    "initialization failed",
    "EngineDeadError",
    "1 validation error",
    "failed to be inspected",
)
# safetensors' names, by those that the kinds have.
_DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A checkpoint and how it is served."""

    group: str
    make: Maker
    ask: str = "completions"
    flags: Mapping[str, str] = field(default_factory=dict)
    """Of `vllm serve`, by our names: MAX_MODEL_LEN."""
    pack: tuple[str, ...] = ()
    """More words for `tensorserve pack`; {directory} is where `make` may leave more."""
    stock_flags: Mapping[str, str] = field(default_factory=dict)
    """That stock needs and a bundle does not (adapters)."""
    refused: str = ""
    """A part of what stock vLLM says on CPU instead of serving it; empty where it serves."""
    refused_here: str = ""
    """A part of what `pack` says instead of packing what stock serves."""

    def accepts(self, seen: Seen) -> bool:
        """Whether its row is no fault: equal, or refused in the words that are known.

        A machine with other kernels, or another vLLM, may serve what is refused on this one.
        """
        if self.refused_here:
            return seen.result == REFUSED and self.refused_here in seen.words
        refused = bool(self.refused) and self.refused in seen.words
        return seen.result == EQUAL or (seen.result == STOCK_REFUSES and refused)


def compare(warm: WarmVllm, directory: Path, tokenizer: Path, name: str, kind: Kind) -> Seen:
    """Make it, pack it encrypted, verify it, start both engines and ask them the same."""
    model = kind.make(directory / "model", tokenizer)
    more = {flag: text.format(directory=directory) for flag, text in kind.stock_flags.items()}
    wanted, reason = served(stock(warm, directory, model, {**kind.flags, **more}), kind)
    row = {
        "kind": name,
        "group": kind.group,
        "asked": kind.ask,
        "vllm": version("vllm"),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    settings, refusal = packed(warm, directory, model, kind)
    if refusal:
        result = REFUSED if wanted is not None else STOCK_REFUSES
        return Seen(**row, result=result, words=f"{reason} {refusal}".strip(), tensors=0, headers=0)
    tensors, others = held(model, directory / "bundle" / "model.tensors")
    got, said = served(ours(warm, directory, settings, dict(kind.flags)), kind)
    view, unlike = viewed(model, directory / "state" / "model")
    if wanted is None:
        result, words = (STOCK_REFUSES, reason) if got is None else (DIFFERS, f"stock: {reason}")
    elif got is None:
        result, words = REFUSED, said
    elif got != wanted:
        result, words = DIFFERS, difference(wanted, got)
    else:
        result, words = EQUAL, ""
    if others or unlike:
        result, words = DIFFERS, one_line(f"{words} tensors: {others}; headers: {unlike}")
    return Seen(**row, result=result, words=words, tensors=tensors, headers=view)


def held(model: Path, bundle: Path) -> tuple[int, str]:
    """(tensors of the bundle, which of them the checkpoint has otherwise: all names, one line)."""
    access = access_for(Settings.from_environment({"TENSORSERVE_MODEL_URI": str(bundle)}))
    source = open_source(str(bundle), access)
    try:
        records = read_index(source).tensors
    finally:
        source.close()
    there = headers(model)
    others = [r.name for r in records if (r.dtype, r.shape) not in there.get(r.name, ())]
    return len(records), " ".join(others)


def viewed(model: Path, served_directory: Path) -> tuple[int, str]:
    """(tensors in the headers that vLLM finds in the served directory, which it would find
    otherwise, or only in one of the two, in the checkpoint's: all names, one line).
    """
    seen, there = headers(served_directory), headers(model)
    others = seen.keys() ^ there.keys() | {n for n in seen if not seen[n] <= there.get(n, set())}
    return len(seen), " ".join(sorted(others))


def headers(directory: Path) -> dict[str, set[tuple[str, tuple[int, ...]]]]:
    """Of each tensor in the safetensors files of `directory`: dtype and shape, in each file."""
    found: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            found.setdefault(name, set()).add((_DTYPES[entry["dtype"]], tuple(entry["shape"])))
    return found


def packed(warm: WarmVllm, directory: Path, model: Path, kind: Kind) -> tuple[dict[str, str], str]:
    """(settings that serve it, ""), or the words of a refusal to pack or verify it."""
    bundle, key = directory / "bundle", directory / "key"
    more = [word.format(directory=directory) for word in kind.pack]
    words = ["pack", str(model), str(bundle), "--encrypt", "--key-file", str(key), *more]
    settings = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY_FILE": str(key)}
    environment = clean_environment() | {"TENSORSERVE_KEY_FILE": str(key)}
    for step, environ in ((words, clean_environment()), (["verify", str(bundle)], environment)):
        log = directory / f"{step[0]}.log"
        code = warm.run([str(BIN / "tensorserve"), *step], environ, log)
        if code:
            return settings, f"{step[0]} {code}: {last_words(log.read_text())}"
    return settings, ""


def served(engine: ForkedEngine, kind: Kind) -> tuple[list[Any] | None, str]:
    """(answers, ""), or (None, why there are none)."""
    with engine:
        try:
            engine.wait_ready()
            answers = ASKS[kind.ask](engine)
        except Refused as error:
            return None, one_line(str(error)) if error.told else last_words(engine.text)
        except AssertionError as error:
            if engine.process is None or engine.process.poll() is None:
                raise
            return None, last_words(engine.text) or one_line(str(error))
    numbers = set(flat(answers))
    assert len(numbers) > 1, f"an answer that shows nothing: {answers}"
    return answers, ""


def last_words(text: str) -> str:
    """Why a program ended: our own error, or the first exception that vLLM's trace names."""
    own = [line for line in text.splitlines() if line.startswith("tensorserve: error: ")]
    if own:
        return one_line(own[-1].removeprefix("tensorserve: error: "))
    named = [m[1] for line in text.splitlines() if (m := _REASON.match(line))]
    root = [words for words in named if not any(part in words for part in _ANOTHERS)]
    return one_line((root or named or text.splitlines() or [""])[-1])


def one_line(text: str) -> str:
    """As a cell of a table takes it."""
    return " ".join(text.split())[:300]


def difference(wanted: list[Any], got: list[Any]) -> str:
    """Where two lists of answers part."""
    for index, (one, other) in enumerate(zip(wanted, got, strict=False)):
        if one != other:
            return one_line(f"answer {index}: stock {str(one)[:120]}, ours {str(other)[:120]}")
    return f"{len(wanted)} answers by stock, {len(got)} by ours"


def flat(answers: Any) -> list[Any]:
    """The numbers and texts of nested lists."""
    if isinstance(answers, dict):
        answers = list(answers.values())
    if not isinstance(answers, list):
        return [answers]
    return [leaf for entry in answers for leaf in flat(entry)]
