"""Which layout do a file's tensors have (checkpoint or vLLM), and can a model load them?

Only the index is read. Files of other tools are described in docs/bundle-format.md.
"""

from __future__ import annotations

from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import FileIndex, TensorRecord
from tensorserve.format.records import KIND_BUFFER

# vLLM's marker tensor in files that hold vLLM's own parameters (vLLM 0.32.0,
# model_executor/model_loader/tensorizer.py).
VLLM_LAYOUT_MARKER = "vllm_tensorized_marker"
# Our marker tensor, one byte. Without its manifest, such a file must not be loaded as a checkpoint:
# load_weights() would transpose, fuse or shard its tensors a second time.
RANK_MARKER = "tensorserve_rank_marker"
# Buffers that tensorizer's `write_module` stores although no checkpoint has them (not persistent in
# transformers 5.19). vLLM computes them and refuses them as unknown weights.
COMPUTED_BUFFERS = frozenset({"position_ids", "token_type_ids", "embed_scale"})
# The suffix: transformers puts prefixes before it ("original_", "local_", a layer type).
_FREQUENCIES = "inv_freq"
# vllm/transformers_utils/config.py (0.32.0), checkpoint_has_lm_head
_HEAD = "lm_head.weight"


def is_vllm_layout(index: FileIndex) -> bool:
    """Whether the file holds vLLM's own parameters, written by vLLM (it has vLLM's marker)."""
    return any(module_name(r) == VLLM_LAYOUT_MARKER for r in index.tensors)


def is_rank_layout(index: FileIndex) -> bool:
    """Whether the file holds one rank's parameters, written by `pack --layout vllm`."""
    return any(record.name == RANK_MARKER for record in index.tensors)


def has_head(index: FileIndex) -> bool:
    """Whether the file is a checkpoint with an lm_head (vLLM's own test, see _HEAD)."""
    return not is_vllm_layout(index) and any(r.name.endswith(_HEAD) for r in index.tensors)


def module_name(record: TensorRecord) -> str:
    """The tensor's name in its module: `write_module` puts a dot before the root's own tensors."""
    return record.name.removeprefix(".")


def loadable(index: FileIndex) -> list[TensorRecord]:
    """The tensors that are loaded: all except markers and buffers that vLLM computes.

    Raises CorruptError for tensors without data: their parameters would stay uninitialised.
    """
    records = [r for r in index.tensors if not _is_computed(r)]
    # A meta tensor has a shape and no data; the file's size does not bound its shape.
    empty = [r.name for r in records if r.is_meta]
    if empty:
        raise CorruptError(
            f"{_tensors(empty)} a shape and no data, for example {empty[0]!r}.",
            hint="The model was on torch's meta device when the file was written. Pack it again.",
        )
    if is_vllm_layout(index):
        emptied = [r.name for r in records if _is_emptied(r)]
        if emptied:
            raise CorruptError(
                f"{_tensors(emptied)} no elements, for example {emptied[0]!r}: the file was "
                "written by vLLM's CPU build after it had moved these weights into its kernels' "
                "memory.",
                hint="The weights are not in the file. Pack the checkpoint with `tensorserve "
                "pack`.",
            )
    return records


def check_layout(
    index: FileIndex, name: str, ranks: int, *, sharded: bool, fingerprinted: bool = False
) -> None:
    """Checks, before vLLM starts, that file `name` can fill a model of `ranks` ranks.

    `sharded`: each rank has a file of its own. `fingerprinted`: the manifest has an engine
    fingerprint. Raises CorruptError as `loadable` does, and if file and manifest differ in layout;
    ConfigurationError for a single file in vLLM's layout and several ranks.
    """
    if is_rank_layout(index) != fingerprinted:
        raise CorruptError(
            f"{name} holds one rank's parameters in vLLM's layout, and no manifest.json says for "
            "which engine."
            if not fingerprinted
            else f"{name} does not hold one rank's parameters, although manifest.json says so.",
            hint="manifest.json is part of the bundle: copy the whole bundle again, or pack it "
            "again.",
        )
    try:
        loadable(index)
    except CorruptError as error:
        raise CorruptError(f"{name}: {error.message}", hint=error.hint) from error
    if is_vllm_layout(index) and ranks > 1 and not sharded:
        raise ConfigurationError(
            f"{name} holds the parameters of one rank in vLLM's layout; this start has {ranks} "
            "ranks.",
            hint="Serve it with a tensor-parallel size of 1, or pack the checkpoint with "
            "`tensorserve pack`, for any size.",
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
    # Parameters with other names may be empty: those of quantized layers without reordering.
    return record.shape == (0,) and record.name.endswith(".weight")


def _tensors(names: list[str]) -> str:
    return "1 tensor has" if len(names) == 1 else f"{len(names)} tensors have"
