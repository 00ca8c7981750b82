"""A job's spans, those of a large tensor as one run: every look gives the same ones."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorserve.loading.spans import Piece, Run, Span, Spans


def made(start: int, length: int, size: int) -> Spans[str]:
    """A header and a run behind it, then another header."""
    spans: Spans[str] = Spans()
    spans.add(Span(1000, 50, [Piece("a", 0, 50, header=True)], small=False))
    spans.add(Run(1050, "a", start, start + length, size))
    spans.add(Span(1050 + length, 7, [Piece("b", 0, 7, header=True)], small=True))
    return spans


@given(start=st.integers(0, 40), length=st.integers(1, 90), size=st.integers(1, 30), data=st.data())
def test_parts_are_what_a_slice_gives(
    start: int, length: int, size: int, data: st.DataObject
) -> None:
    """In any cut; a span ends at a multiple of the size, and begins where the one before ends."""
    spans = made(start, length, size)
    first = data.draw(st.integers(0, len(spans)))
    stop = data.draw(st.integers(first, len(spans)))
    found: list[tuple[int, int, int]] = []
    for number, part in spans.parts(first, stop):
        assert number == first + len(found)
        each = [part] if isinstance(part, Span) else [part.span(i) for i in range(part.count)]
        found += [(span.offset, span.length, span.pieces[0].start) for span in each]
    assert found == [(s.offset, s.length, s.pieces[0].start) for s in spans[first:stop]]
    for before, after in pairwise(spans):
        assert before.offset + before.length == after.offset
    for number, span in enumerate(spans):
        assert spans.offset(number) == span.offset
        end = span.pieces[0].start + span.length
        assert span.pieces[0].header or end % size == 0 or end == start + length


def test_a_span_of_a_run_is_made_once() -> None:
    """Two threads that claim it have to mean the same one."""
    spans = made(3, 40, 10)
    assert spans[2] is spans[2]
    assert spans[-1] is spans[len(spans) - 1]
    with pytest.raises(IndexError):
        spans[len(spans)]
