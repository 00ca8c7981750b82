"""What was seen of each kind of the matrix: kept in matrix.json, shown in docs/models.md.

Run as a program it makes the page anew; with `--check` it only compares. Both are written by
test_matrix.py: no result is typed in.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

DATA = Path(__file__).with_name("matrix.json")
PAGE = Path(__file__).parents[2] / "docs/models.md"

EQUAL, DIFFERS = "equal", "differs"
STOCK_REFUSES, REFUSED = "stock refuses", "refused"
_MEANING = {
    EQUAL: "served, equal to stock",
    DIFFERS: "**differs from stock**",
    STOCK_REFUSES: "stock does not serve it here",
    REFUSED: "refused, stock serves it",
}


@dataclass(frozen=True)
class Seen:
    """A row of the table."""

    kind: str
    group: str
    asked: str
    result: str
    """EQUAL, DIFFERS, STOCK_REFUSES or REFUSED."""
    words: str
    """Where it is not equal: what was said, in one line."""
    tensors: int
    """Of the bundle, each with the checkpoint's name, dtype and shape."""
    headers: int
    """Tensors that vLLM finds in safetensors headers of the served directory, each as in the
    checkpoint's, and none is missing.
    """
    vllm: str
    date: str


def read() -> dict[str, Seen]:
    """The rows, by kind."""
    rows = json.loads(DATA.read_text()) if DATA.exists() else []
    return {row["kind"]: Seen(**row) for row in rows}


def record(seen: Seen, kinds: list[str]) -> None:
    """Keep a row, in the order of `kinds`, and make the page anew. Others' rows are dropped."""
    rows = read() | {seen.kind: seen}
    kept = [asdict(rows[kind]) for kind in kinds if kind in rows]
    DATA.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(read()))


def page(rows: dict[str, Seen]) -> str:
    """The whole of docs/models.md."""
    results = [row.result for row in rows.values()]
    counts = "; ".join(
        f"{results.count(result)} {meaning.strip('*')}"
        for result, meaning in _MEANING.items()
        if result in results
    )
    parts = [_HEAD.format(count=len(rows), counts=counts)]
    for group in dict.fromkeys(row.group for row in rows.values()):
        parts += [f"## {group[0].upper()}{group[1:]}\n", _TABLE]
        parts += [_row(row) for row in rows.values() if row.group == group]
        parts.append("")
    return "\n".join(parts)


_HEAD = """# Models

<!-- made by tests/models/matrix_page.py from matrix.json, which `make test-models` writes -->

{count} kinds of model were compared with stock vLLM on vLLM's CPU build: {counts}.

- **The model.** Each is a tiny model with random weights (all-MiniLM-L6-v2 is a real one). It is
  made as a directory of its kind, packed with `--encrypt`, verified and served with `tensorserve
  serve`. Stock `vllm serve` gets the same flags and the directory itself.
- **The answers.** Both get the same requests, one after the other. Every text and number has to be
  equal to the last bit: for completions 16 tokens, their log-probabilities and those of the next
  best; else all vectors, scores or probabilities.
- **The tensors.** In every row, names, dtypes and shapes are compared with the checkpoint's: those
  of the bundle's tensors, and those that vLLM finds in safetensors headers of the served directory.
- **Not served by stock.** Where stock vLLM does not serve a kind on this build, the table has
  vLLM's own words. The bundle is packed and verified all the same, its tensors are compared, and
  its start must not serve either. Which kernels exist depends on the machine too: those for 4 bit
  need AVX-512.

The bundles have layout `hf`; `tests/models/test_models.py` compares layout `vllm` for some kinds.
Nothing here has run on a GPU.
"""
_TABLE = (
    "| kind | asked for | tensors | headers | result | vLLM | seen |\n|---|---|---|---|---|---|---|"
)


def _row(row: Seen) -> str:
    words = row.words.replace("|", "\\|").replace("<", "&lt;")
    result = _MEANING[row.result] + (f": {words}" if words else "")
    cells = (row.kind, row.asked, str(row.tensors), str(row.headers), result, row.vllm, row.date)
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    """Make the page, or say whether it is what the data says."""
    wanted = page(read())
    if "--check" in arguments:
        if PAGE.exists() and PAGE.read_text() == wanted:
            return 0
        print(f"{PAGE.name} is not what {DATA.name} says: python {Path(__file__).name}")
        return 1
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
