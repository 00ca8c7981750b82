"""docs/measurements.md says what was measured: every table in it comes from bench/results."""

from __future__ import annotations

from pathlib import Path

from bench.table import page

ROOT = Path(__file__).parents[3]
MARK = "<!-- made by: python -m bench.table bench/results/*.json -->\n"


def test_the_page_is_made_of_the_results() -> None:
    """Nothing in its tables was typed in."""
    results = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert results
    text = (ROOT / "docs" / "measurements.md").read_text()
    assert text.partition(MARK)[2].strip() == page(results).strip()
