"""Every cache of compiled code has a place of its own below one root."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.config.compile_caches import CACHES, cache_root, cache_variables
from tensorserve.config.environment import child_environment


def test_no_cache_is_inside_of_another_one() -> None:
    """So that one can be emptied, or sealed, without the others."""
    places = [Path(value) for value in cache_variables(Path("/c")).values()]

    assert len(places) == len({cache.variable for cache in CACHES})
    assert not [
        (one, other)
        for one in places
        for other in places
        if one in other.parents or one == Path("/c")
    ]


def test_the_engine_may_inherit_every_variable() -> None:
    """Else a library would not see its place."""
    ours = cache_variables(Path("/c"))

    assert dict(child_environment(ours, None)) == ours


@pytest.mark.parametrize(
    ("value", "root"), [("/c", Path("/c")), ("c", None), ("", None), (None, None)]
)
def test_the_root_is_absolute_or_none(value: str | None, root: Path | None) -> None:
    """A relative one is ignored, as for all programs that follow the specification."""
    assert cache_root({} if value is None else {"XDG_CACHE_HOME": value}) == root
