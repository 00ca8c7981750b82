"""Which weight files does vLLM open besides the checkpoint, and how does a bundle store them?

While it builds a model, vLLM opens some weight files below the model directory itself, without a
loader (launch/directory_reads.py lists them). A bundle stores each as a .tensors file, encrypted as
the model's: ``2_Dense/model.safetensors.tensors``. A start provides them to vLLM as files in
memory, at the original names (launch/served_directory.py).
"""

from __future__ import annotations

from pathlib import PurePosixPath

from tensorserve.bounded_json import read_json
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.bundle.manifest import Manifest
from tensorserve.errors import CorruptError

MODULES = "modules.json"
_TENSORS = ".tensors"
NESTED_FILE = "model.safetensors"
_SUFFIX = ".safetensors" + _TENSORS
# vllm/transformers_utils/config.py (0.32.0), _DENSE_MODULE_TYPES
DENSE_TYPES = frozenset(
    {
        "sentence_transformers.models.Dense",
        "sentence_transformers.base.modules.dense.Dense",
        "pylate.models.Dense.Dense",
    }
)
# vllm/model_executor/models/roberta.py (0.32.0), BgeM3EmbeddingModel: reads pickled files only.
PICKLED_CLASS = "BgeM3EmbeddingModel"


def bundle_name(name: str) -> str:
    """The bundle's .tensors file with the weights that vLLM reads at `name`."""
    return name + _TENSORS


def nested_of(manifest: Manifest | None) -> tuple[str, ...]:
    """The names of the nested weight files that this bundle has, sorted."""
    files = manifest.tensors_files if manifest else ()
    return tuple(sorted(name.removesuffix(_TENSORS) for name in files if name.endswith(_SUFFIX)))


def dense_folders(modules: bytes, where: str) -> tuple[str, ...]:
    """The folders of the Dense layers in `modules`, a sentence-transformers modules.json.

    `where` names the file in errors. Raises CorruptError if vLLM could not read it, or if a path
    leaves the model's directory.
    """
    try:
        listed = read_json(modules)
        if isinstance(listed, dict):
            listed = listed.get("modules", [])
        paths = [module.get("path", "") for module in listed if module.get("type") in DENSE_TYPES]
        folders = tuple(str(PurePosixPath(path)) for path in paths)
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"{where} is not a list of sentence-transformers modules.",
            hint="Download the model again; vLLM could not read the file either.",
        ) from error
    for folder, path in zip(folders, paths, strict=True):
        if not path or leaves_bundle(folder):
            raise CorruptError(
                f"{where} has a Dense layer in {path!r}, which is not a folder of the model.",
                hint="Download the model again: sentence-transformers writes one folder for each "
                "module (2_Dense).",
            )
    return folders


def check_dense(modules: bytes, where: str, names: set[str]) -> None:
    """Raises CorruptError unless `names` include the weights of each Dense layer.

    vLLM silently omits a Dense layer without weights, which changes the size of the embeddings.
    `modules` is the content of modules.json, `where` its name in errors.
    """
    for folder in dense_folders(modules, where):
        if f"{folder}/{NESTED_FILE}" not in names:
            raise CorruptError(
                f"{where} names a Dense layer in {folder}, but the bundle lacks its weights: "
                "vLLM would leave the layer out and compute other embeddings.",
                hint="Pack the model again with this release: `pack` includes these weights.",
            )
