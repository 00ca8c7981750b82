"""Fuzzes the parsers of index and headers, guided by coverage. By hand, not in CI:

    .venv/bin/pip install --no-deps atheris==3.0.0
    .venv/bin/python tests/fuzz/fuzz_index.py -runs=200000

(atheris has 35 MB, so it is in no lock.) Arguments are libFuzzer's. New inputs go to a temporary
folder, or to the first folder named; what ends the run is written to ./crash-*. Inputs worth
keeping belong in tests/fuzz/corpus, which a unit test replays: see ``--keep`` below.

    .venv/bin/python tests/fuzz/fuzz_index.py --keep FOLDER

adds FOLDER's inputs to the corpus, as far as they cover lines that it does not cover yet.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
MOST_BYTES = 4096


def fuzz() -> None:
    """Runs libFuzzer; ends the process."""
    import atheris

    with atheris.instrument_imports(
        include=[f"tensorserve.format.{part}" for part in ("bounded", "dtypes", "header", "index")]
        + ["tensorserve.format.tensor_names", "tensorserve.format.read_tensor"]
    ):
        import tensorserve.format  # noqa: F401
    from index_target import check

    def one(data: bytes) -> None:
        check(data)

    arguments = sys.argv[1:]
    folders = [argument for argument in arguments if not argument.startswith("-")]
    options = [argument for argument in arguments if argument.startswith("-")]
    if not folders:
        folders = [tempfile.mkdtemp(prefix="fuzz-index-")]
    atheris.Setup(
        [sys.argv[0], f"-max_len={MOST_BYTES}", *options, *folders, str(CORPUS)],
        one,
    )
    atheris.Fuzz()


def keep(folder: Path) -> None:
    """Copies from ``folder`` what reaches lines of the parsers that the corpus does not."""
    from index_target import check

    seen: set[tuple[str, int, int]] = set()
    CORPUS.mkdir(exist_ok=True)
    kept = sorted(CORPUS.iterdir())
    new = sorted(folder.iterdir(), key=lambda path: path.stat().st_size)
    for path in [*kept, *new]:
        data = path.read_bytes()
        steps: set[tuple[str, int, int]] = set()
        last = 0

        def trace(frame, event, _, steps=steps):  # type: ignore[no-untyped-def]
            nonlocal last
            name = frame.f_code.co_filename
            if "tensorserve/format/" not in name:
                return None
            if event == "line":
                steps.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return trace

        sys.settrace(trace)
        try:
            check(data)
        finally:
            sys.settrace(None)
        if path in kept or steps - seen:
            seen |= steps
            name = hashlib.sha256(data).hexdigest()[:16]
            if path not in kept:
                (CORPUS / name).write_bytes(data)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE)]
    if sys.argv[1:2] == ["--keep"]:
        keep(Path(sys.argv[2]))
    else:
        fuzz()
