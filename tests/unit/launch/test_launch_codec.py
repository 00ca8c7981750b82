"""What is handed over comes back as it was, and what does not fit is refused without its values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tensorserve.errors import TensorserveError
from tensorserve.launch.codec import decode, encode
from tensorserve.secret import Secret


@dataclass(frozen=True)
class Inner:
    name: str
    secret: Secret | None = None


@dataclass(frozen=True)
class Outer:
    """Each kind of field that there is."""

    count: int
    seconds: float
    on: bool
    maybe: bool | None
    path: Path
    inner: Inner
    inners: tuple[Inner, ...]
    pairs: tuple[tuple[str, int | str], ...]
    numbers: frozenset[int]
    anything: Mapping[str, Any] | None


VALUE = Outer(
    count=3,
    seconds=8.5,
    on=False,
    maybe=None,
    path=Path("/a/\udcff b"),
    inner=Inner("ä\n", Secret(bytes(range(256)), "KEY_FILE=/k")),
    inners=(Inner(""), Inner("b")),
    pairs=(("a", 1), ("b", "1")),
    numbers=frozenset({3, 1}),
    anything={"a": [1, None, {"b": 2.5}]},
)


def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(encode(VALUE)))
    return found


def test_everything_comes_back_as_it_was() -> None:
    """Types too: a tuple is no list, and 1 is not "1"."""
    again = decode(Outer, document())
    assert again == VALUE
    assert again.inner.secret is not None
    assert again.inner.secret.origin == "KEY_FILE=/k"
    assert isinstance(again.inners, tuple)
    assert [type(value) for _, value in again.pairs] == [int, str]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("count"), "Outer.count is missing"),
        (lambda d: d.update(more=1), "Outer.more is unknown"),
        (lambda d: d.update(count="3"), "Outer.count is of type str"),
        (lambda d: d.update(count=True), "Outer.count is of type bool"),
        (lambda d: d.update(on=1), "Outer.on is of type int"),
        (lambda d: d.update(seconds="canary"), "Outer.seconds is of type str"),
        (lambda d: d.update(path=None), "Outer.path is of type NoneType"),
        (lambda d: d.update(inner=[]), "Outer.inner is of type list"),
        (lambda d: d["inner"].update(more=1), "Outer.inner.more is unknown"),
        (lambda d: d["inners"][1].pop("name"), r"Outer.inners\[1\].name is missing"),
        (lambda d: d.update(pairs=[["a"]]), r"Outer.pairs\[0\] has 1 items"),
        (lambda d: d.update(numbers=["canary"]), "Outer.numbers is of type str"),
        (lambda d: d["inner"]["secret"].pop("origin"), "Outer.inner.secret"),
        (lambda d: d["inner"].update(secret="canary"), "Outer.inner.secret"),
        (lambda d: d["inner"]["secret"].update(base64="canary!"), "Outer.inner.secret"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], object], said: str
) -> None:
    """By the field's name, and never with a value."""
    changed = document()
    change(changed)
    with pytest.raises(TensorserveError, match=said) as caught:
        decode(Outer, changed)
    assert "canary" not in str(caught.value)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(TensorserveError, match="Outer is of type list"):
        decode(Outer, [])


def test_what_could_not_come_back_is_not_written() -> None:
    """A mistake of ours, found by whoever adds such a field."""
    with pytest.raises(TypeError, match="set cannot be handed over"):
        encode({1, 2})
