"""What is known of a file from its index: its layout, and whether a model can take its tensors."""

from __future__ import annotations

import pytest

from tensorserve.bundle.layout import check_layout, has_head, is_vllm_layout, loadable
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import FileIndex, TensorRecord
from tensorserve.format.records import KIND_BUFFER, KIND_PARAMETER, KIND_STATE_DICT

MARKER = ".vllm_tensorized_marker"


def record(
    name: str, *, meta: bool = False, kind: int = KIND_STATE_DICT, shape: tuple[int, ...] = (4,)
) -> TensorRecord:
    return TensorRecord(
        name=name,
        raw_name=name.encode(),
        kind=kind,
        dtype="float32",
        raw_dtype="<f4",
        shape=shape,
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


def test_computed_buffers_and_the_marker_are_left_out() -> None:
    """`write_module` stores buffers that no checkpoint has; vLLM refuses them."""
    found = loadable(
        index(
            record("model.layers.0.weight"),
            record("model.rotary_emb.inv_freq"),
            record("model.rotary_emb.original_inv_freq", kind=KIND_BUFFER),
            record("embeddings.position_ids", kind=KIND_BUFFER),
            record(MARKER, meta=True),
        )
    )
    assert [r.name for r in found] == ["model.layers.0.weight"]


def test_a_head_is_known_by_its_name() -> None:
    """As vLLM knows it; what vLLM's own writer stored is not a checkpoint."""
    head = record("language_model.lm_head.weight")
    assert has_head(index(head))
    assert not has_head(index(record("model.norm.weight")))
    assert not has_head(index(head, record(MARKER, meta=True)))


def test_only_buffers_are_left_out() -> None:
    """A parameter, and what a state dict holds, is the checkpoint's own; so are other buffers."""
    records = [
        record("embeddings.position_ids"),
        record("layer.embed_scale", kind=KIND_PARAMETER),
        record("mlp.gate.e_score_correction_bias", kind=KIND_BUFFER),
    ]
    assert loadable(index(*records)) == records


def test_a_tensor_without_data_ends_the_load() -> None:
    """A1: its shape is bounded by nothing, and a parameter would stay as it was born."""
    with pytest.raises(CorruptError, match=r"1 tensor has a shape and no data.*layers\.1\.weight"):
        loadable(index(record("layers.0.weight"), record("layers.1.weight", meta=True)))


def test_the_marker_tells_vllms_layout() -> None:
    """With and without the dot that `write_module` puts before root tensors."""
    assert is_vllm_layout(index(record(MARKER, meta=True)))
    assert is_vllm_layout(index(record(MARKER[1:], meta=True)))
    assert not is_vllm_layout(index(record("model.weight")))


def test_what_vllms_cpu_build_emptied_is_refused_by_name() -> None:
    """Before the engine starts; an empty parameter that is no weight is nothing to refuse."""
    emptied = record("layers.0.qkv_proj.weight", shape=(0,))
    order = record("layers.0.qkv_proj.g_idx", shape=(0,))
    marker = record(MARKER, meta=True)
    with pytest.raises(CorruptError, match=r"^m\.tensors: 1 tensor has no.*qkv_proj.*CPU build"):
        check_layout(index(marker, emptied, order), "m.tensors", 1, sharded=False)
    check_layout(index(marker, order), "m.tensors", 1, sharded=False)
    check_layout(index(emptied), "m.tensors", 1, sharded=False)  # a checkpoint may hold it


def test_one_file_in_vllms_layout_is_for_one_rank() -> None:
    """Each rank would take the other's parameters."""
    found = index(record(MARKER, meta=True), record("layers.0.weight"))
    with pytest.raises(ConfigurationError, match="2 ranks"):
        check_layout(found, "m.tensors", 2, sharded=False)
    check_layout(found, "m.tensors", 2, sharded=True)
    check_layout(index(record("layers.0.weight")), "m.tensors", 2, sharded=False)
