"""Is a path in a name's place read and refused as tensorizer reads and refuses it?"""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorizer._tensor_path import _TensorPath

from tensorserve.format.tensor_names import BadNameError, parse_name

pieces = st.sampled_from(
    [
        *(b"[", b"]", b",", b'"', b'"a"', b'"b.c"', b"0", b"1", b"-1", b"-0", b"1e5", b"2.0"),
        *(b"true", b"null", b"NaN", b"Infinity", b"{", b"}", b":", b" ", b"\t", b"\n", b"\r"),
        *(b'"\\u00e9"', b'"\\n"', b"\x00", "é".encode(), b"\xff", b"\x1e", b"[]", b"9" * 50),
    ]
)
paths = st.lists(pieces, max_size=9).map(lambda parts: b"\x1e" + b"".join(parts))
arrays = st.lists(pieces, max_size=5).map(lambda parts: b"\x1e[" + b",".join(parts) + b"]")


def _theirs(raw: bytes) -> str | None:
    """The dotted name of tensorizer's path; None where it refuses."""
    try:
        return ".".join(map(str, _TensorPath.deserialize_(raw)))
    except (ValueError, TypeError):
        return None


def _ours(raw: bytes) -> str | None:
    try:
        return parse_name(raw)
    except BadNameError:
        return None


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(paths | arrays)
@example(b'\x1e["a",0]')
@example(b'\x1e ["a"]')
@example(b'\x1e["a"]\n')
@example(b'\x1e[\n"a"]')
@example(b'\x1e[ "a" ]')
@example(b"\x1e")
def test_a_path_that_we_read_tensorizer_reads_alike(raw: bytes) -> None:
    """Nothing is a name to us and none to tensorizer, or another one."""
    ours = _ours(raw)

    assert ours is None or ours == _theirs(raw)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(paths | arrays)
def test_a_path_that_tensorizer_reads_we_read(raw: bytes) -> None:
    """Except with bytes that are not ASCII, which it never writes, and truth values."""
    theirs = _theirs(raw)

    if theirs is not None and raw.isascii() and b"true" not in raw:
        assert _ours(raw) == theirs


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.lists(
        st.integers(0, 2**70) | st.text(st.characters(exclude_categories=["Cs"])),
        min_size=1,
        max_size=6,
    )
)
def test_every_path_that_tensorizer_writes_we_read(parts: list[str | int]) -> None:
    """Any keys and indices; a path of one key is written as the key itself."""
    if parts in ([""], *[[p] for p in parts if isinstance(p, str) and p.startswith("\x1e")]):
        return  # no name at all, or one that tensorizer does not read back as it was
    raw = _TensorPath(parts).serialized_()

    assert parse_name(raw) == ".".join(map(str, parts))


@pytest.mark.parametrize("raw", [b'\x1e ["a"]', b'\x1e["a"] ', b'\x1e["a",\n0]', b'\x1e["a"]\r'])
def test_white_space_around_a_path_and_line_breaks_are_refused(raw: bytes) -> None:
    """They would make two spellings of one name, of which tensorizer knows one."""
    with pytest.raises(BadNameError, match="on one line"):
        parse_name(raw)
