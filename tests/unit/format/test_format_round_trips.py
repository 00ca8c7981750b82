"""Does any set of tensors survive our writer and tensorizer's reader, and the other way round?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorizer import TensorDeserializer

from tensors_samples import FixedKey, compact, decryption, encryption, tensor_bytes, we_read, write
from tensorserve.format import ITEM_SIZES, TensorRecord, TensorSpec, plan_file, write_file

# What stands for a path in a name's place would be read as one.
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: not name.startswith("\x1e")
)
shapes = st.lists(st.integers(1, 5), max_size=5).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """1 to 8 tensors of any dtype; the bytes are any as well, but for booleans."""
    made = {}
    for name in draw(st.lists(names, min_size=1, max_size=8, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(ITEM_SIZES))), draw(shapes)
        size = torch.Size(shape).numel() * ITEM_SIZES[dtype]
        seed = draw(st.integers(0, 2**32))
        generator = torch.Generator().manual_seed(seed)
        top = 2 if dtype == "bool" else 256
        data = torch.randint(0, top, (size,), dtype=torch.uint8, generator=generator)
        made[name] = data.view(getattr(torch, dtype)).reshape(shape)
    return made


nested = st.recursive(
    st.builds(lambda value: torch.tensor([value]), st.integers(0, 255)),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(names.filter(lambda name: "." not in name), inner, min_size=1, max_size=3)
    ),
    max_leaves=6,
).filter(lambda content: not isinstance(content, torch.Tensor))

round_trip = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


class _Output(bytearray):
    def write(self, data: bytes | memoryview, /) -> None:
        self.extend(data)


def _described(content: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    return [
        (name, str(t.dtype).removeprefix("torch."), tuple(t.shape), tensor_bytes(t))
        for name, t in content.items()
    ]


@round_trip
@given(tensors(), st.sampled_from(["plain", "key"]))
def test_what_we_write_tensorizer_reads(content: dict[str, torch.Tensor], kind: str) -> None:
    """Names, order, dtypes, shapes and bytes; tensorizer checks every hash."""
    described = _described(content)
    contents = {name: data for name, _, _, data in described}
    plan = plan_file(
        (TensorSpec(name, dtype, shape) for name, dtype, shape, _ in described),
        encrypted=kind != "plain",
    )

    def read(record: TensorRecord, start: int, buffer: memoryview) -> None:
        buffer[:] = contents[record.name][start : start + len(buffer)]

    out = _Output()
    write_file(out, plan, read, key=FixedKey() if kind == "key" else None)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tensors"
        path.write_bytes(out)
        with TensorDeserializer(
            path, device="cpu", encryption=decryption(kind), verify_hash=True, num_readers=1
        ) as found:
            theirs = _described({name: found[name] for name in found})
    assert theirs == described


@round_trip
@given(tensors(), st.sampled_from(["plain", "key"]), st.booleans())
def test_what_tensorizer_writes_we_read(
    content: dict[str, torch.Tensor], kind: str, cut: bool
) -> None:
    """The same, with and without tensorizer's reserve in the index; we check every hash."""
    described = _described(content)
    data = write(content, encryption(kind))

    ours = we_read(compact(data) if cut else data, FixedKey() if kind == "key" else None)

    assert [(name, *found[1:]) for name, found in ours.items()] == described


def _flattened(content: object, prefix: str = "") -> list[tuple[str, int]]:
    if isinstance(content, torch.Tensor):
        return [(prefix, int(content.item()))]
    assert isinstance(content, (list, dict))
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    return [
        leaf
        for key, value in pairs
        for leaf in _flattened(value, f"{prefix}.{key}" if prefix else str(key))
    ]


@round_trip
@given(nested)
def test_structures_that_tensorizer_writes_we_read_in_order(content: object) -> None:
    """Any nesting of lists and dicts: dotted names, depth first."""
    ours = we_read(write(content))

    assert [
        (name, int.from_bytes(found[3], "little")) for name, found in ours.items()
    ] == _flattened(content)
