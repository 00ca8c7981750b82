"""docs/models.md says what make test-models has seen, of every kind of the matrix."""

from __future__ import annotations

import pytest
from matrix_kinds import KINDS
from matrix_page import DIFFERS, PAGE, REFUSED, Seen, page, read


def test_the_page_is_what_the_data_says() -> None:
    """No result on it is typed in."""
    assert PAGE.read_text() == page(read())


def test_each_kind_of_the_matrix_has_a_row() -> None:
    """In the matrix's order, and there is none of a kind that is not tried."""
    assert list(read()) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stock_serves_is_served_the_same(kind: str) -> None:
    """A row that differs is a fault; a refusal is declared with its kind."""
    seen = read()[kind]
    assert KINDS[kind].accepts(seen), (seen.result, seen.words)


def test_a_difference_is_shown_as_one() -> None:
    """Were one seen, the page would not pass over it."""
    rows = {
        result: Seen(result, "group", "completions", result, "a | b", 3, 4, "1", "2026-11-30")
        for result in (DIFFERS, REFUSED)
    }
    shown = page(rows)
    assert "| differs | completions | 3 | 4 | **differs from stock**: a \\| b | 1 |" in shown
    assert "| refused | completions | 3 | 4 | refused, stock serves it: a \\| b |" in shown
