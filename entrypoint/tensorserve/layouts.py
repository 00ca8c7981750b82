"""How are a file's tensors laid out, as in a checkpoint or as in vLLM, and can a model take them?

All from the index, before anything costly. What others' tools write is described in
docs/bundle-format.md.
"""

from __future__ import annotations

from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import FileIndex, TensorRecord
from tensorserve.format.records import KIND_BUFFER

# tensorizer's mark for files that hold vLLM's own parameters instead of a checkpoint's.
VLLM_LAYOUT_MARKER = "vllm_tensorized_marker"
# Ours, a single byte: without the manifest that belongs to it such a file must not be taken for a
# checkpoint, whose tensors are transposed, fused or cut on their way into the model.
RANK_MARKER = "tensorserve_rank_marker"
# Buffers that `write_module` stores although no checkpoint has them (not persistent in
# transformers 5.19): vLLM computes them itself and refuses them as unknown weights.
COMPUTED_BUFFERS = frozenset({"position_ids", "token_type_ids", "embed_scale"})
# With prefixes in transformers ("original_", "local_", a layer type), and in old checkpoints too.
_FREQUENCIES = "inv_freq"
# vllm/transformers_utils/config.py (0.32.0), checkpoint_has_lm_head
_HEAD = "lm_head.weight"


def is_vllm_layout(index: FileIndex) -> bool:
    """Whether the file holds vLLM's own parameters (tensorizer's marker), not a checkpoint's."""
    return any(module_name(r) == VLLM_LAYOUT_MARKER for r in index.tensors)


def is_rank_layout(index: FileIndex) -> bool:
    """Whether the file holds a rank's parameters as `pack --layout vllm` writes them."""
    return any(record.name == RANK_MARKER for record in index.tensors)


def has_head(index: FileIndex) -> bool:
    """Whether a checkpoint's tensors have a head of their own (by vLLM's own test for it)."""
    return not is_vllm_layout(index) and any(r.name.endswith(_HEAD) for r in index.tensors)


def module_name(record: TensorRecord) -> str:
    """The tensor's name in its module: `write_module` puts a dot before what the root owns."""
    return record.name.removeprefix(".")


def loadable(index: FileIndex) -> list[TensorRecord]:
    """The tensors that the model gets: all but the marker and what vLLM computes itself.

    Raises CorruptError where tensors have no data: parameters would stay as they were born.
    """
    records = [r for r in index.tensors if not _is_computed(r)]
    # A shape without data, which is bounded by nothing in the file.
    empty = [r.name for r in records if r.is_meta]
    if empty:
        raise CorruptError(
            f"{_tensors(empty)} a shape and no data, for example {empty[0]!r}.",
            hint="The model was on torch's meta device when it was written. Pack it again.",
        )
    if is_vllm_layout(index):
        emptied = [r.name for r in records if _is_emptied(r)]
        if emptied:
            raise CorruptError(
                f"{_tensors(emptied)} no elements, for example {emptied[0]!r}: the file was "
                "written by vLLM's CPU build, which had moved these weights into its kernels' own "
                "memory before.",
                hint="They are not in the file. Pack the checkpoint with `tensorserve pack`.",
            )
    return records


def check_layout(
    index: FileIndex, name: str, ranks: int, *, sharded: bool, fingerprinted: bool = False
) -> None:
    """What can be known before vLLM starts: file `name` can fill a model of `ranks` ranks.

    `sharded` says that each rank has a file of its own, `fingerprinted` that the manifest says for
    which engine the file is. Raises CorruptError as `loadable` does and where file and manifest
    are not of one layout, ConfigurationError for one file in vLLM's layout and several ranks.
    """
    if is_rank_layout(index) != fingerprinted:
        raise CorruptError(
            f"{name} holds a rank's parameters as vLLM holds them, and no manifest.json says for "
            "which engine."
            if not fingerprinted
            else f"{name} does not hold a rank's parameters, as manifest.json says that it does.",
            hint="manifest.json belongs to the bundle: copy the whole bundle again, or pack it "
            "again.",
        )
    try:
        loadable(index)
    except CorruptError as error:
        raise CorruptError(f"{name}: {error.message}", hint=error.hint) from error
    if is_vllm_layout(index) and ranks > 1 and not sharded:
        raise ConfigurationError(
            f"{name} holds the parameters of one rank as vLLM holds them; {ranks} ranks are "
            "asked for.",
            hint="Serve it with a tensor-parallel size of 1, or pack the checkpoint with "
            "`tensorserve pack`: that fits any size.",
        )


def _is_computed(record: TensorRecord) -> bool:
    name = module_name(record)
    last = name.rpartition(".")[2]
    return (
        name == VLLM_LAYOUT_MARKER
        or name.endswith(f"rotary_emb.{_FREQUENCIES}")
        or (
            record.kind == KIND_BUFFER and (last in COMPUTED_BUFFERS or last.endswith(_FREQUENCIES))
        )
    )


def _is_emptied(record: TensorRecord) -> bool:
    # Other parameters may be empty in order: quantized layers without reordering, for example.
    return record.shape == (0,) and record.name.endswith(".weight")


def _tensors(names: list[str]) -> str:
    return "1 tensor has" if len(names) == 1 else f"{len(names)} tensors have"
