"""What the loader does with a file before and while it fills a model, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import FileIndex, TensorRecord


@pytest.fixture(scope="module")
def loader() -> Any:
    """Imported late: it imports vLLM, which takes seconds."""
    from tensorserve import vllm_loader

    return vllm_loader


def record(name: str, *, meta: bool = False) -> TensorRecord:
    return TensorRecord(
        name=name,
        raw_name=name.encode(),
        kind=2,
        dtype="float32",
        raw_dtype="<f4",
        shape=(4,),
        long_shape=False,
        is_meta=meta,
        header_offset=100,
        data_offset=200,
        length=0 if meta else 16,
    )


def index(*records: TensorRecord) -> FileIndex:
    return FileIndex(
        file_version=3, encrypted=True, tensors=records, size=1000, data_bytes=16, digest="0" * 64
    )


def test_computed_buffers_and_the_marker_are_left_out(loader: Any) -> None:
    """`write_module` stores buffers that no checkpoint has; vLLM refuses them."""
    found = loader.loadable(
        index(
            record("model.layers.0.weight"),
            record("model.rotary_emb.inv_freq"),
            record(".vllm_tensorized_marker", meta=True),
        )
    )
    assert [r.name for r in found] == ["model.layers.0.weight"]


def test_a_tensor_without_data_ends_the_load(loader: Any) -> None:
    """A1: its shape is bounded by nothing, and a parameter would stay as it was born."""
    with pytest.raises(CorruptError, match=r"layers\.1\.weight"):
        loader.loadable(index(record("layers.0.weight"), record("layers.1.weight", meta=True)))


def test_the_marker_tells_vllms_layout(loader: Any) -> None:
    """With and without the dot that `write_module` puts before root tensors."""
    assert loader.is_vllm_layout(index(record(".vllm_tensorized_marker", meta=True)))
    assert loader.is_vllm_layout(index(record("vllm_tensorized_marker", meta=True)))
    assert not loader.is_vllm_layout(index(record("model.weight")))


class Tied(nn.Module):
    """Two names for one parameter, and a buffer that is born with a value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(2, 2))
        self.head = self.embed
        self.norm = nn.Parameter(torch.zeros(2))
        self.register_buffer("scale", torch.ones(1))


def tensors(**changes: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ({"embed": torch.ones(2, 2), "norm": torch.ones(2)} | changes).items()


def test_a_file_in_vllms_layout_is_copied_in_place(loader: Any) -> None:
    """One name of tied parameters is enough; memory stays where it was."""
    model = Tied()
    before = model.embed.data_ptr()
    loader.copy_in_place(model, tensors())
    assert model.embed.data_ptr() == before
    assert torch.equal(model.head, torch.ones(2, 2))
    assert torch.equal(model.scale, torch.ones(1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"other": torch.ones(1)}, "does not have"),
        ({"norm": torch.ones(3)}, r"\(3,\)"),
        ({"norm": torch.ones(2, dtype=torch.float16)}, "float16"),
    ],
)
def test_what_does_not_fit_the_model_is_named(
    loader: Any, changes: dict[str, torch.Tensor], said: str
) -> None:
    """Another model, version, dtype or parallel size: refused, never broadcast or converted."""
    with pytest.raises(ConfigurationError, match=said):
        loader.copy_in_place(Tied(), tensors(**changes))


def test_a_parameter_that_the_file_lacks_ends_the_load(loader: Any) -> None:
    """The invariant: never ready with wrong weights."""
    with pytest.raises(CorruptError, match="norm"):
        loader.copy_in_place(Tied(), iter([("embed", torch.ones(2, 2))]))
