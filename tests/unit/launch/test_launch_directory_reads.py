"""The list of what vLLM reads in a model's directory is that of the installed vLLM."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tensorserve.config.vllm_flags import VLLM_VERSION as INSTALLED
from tensorserve.launch.directory_reads import ANSWERS, OTHERS, READS, VLLM_VERSION

# vLLM's and its libraries' own ways to a model's files: wherever they are called.
MODELS = frozenset(
    """
    get_safetensors_params_metadata get_hf_file_bytes get_hf_file_to_dict file_or_path_exists
    list_filtered_repo_files is_mistral_model_repo list_repo_files try_get_local_file
    any_pattern_in_repo_files file_exists parse_safetensors_file_metadata
    get_sentence_transformer_tokenizer_config get_pooling_config try_get_dense_modules
    try_get_tokenizer_config try_get_generation_config checkpoint_has_lm_head get_model_path
    get_non_weight_snapshot_path safe_open load_file hf_hub_download snapshot_download cached_file
    from_pretrained get_config_dict get_tokenizer_config get_class_from_dynamic_module
    try_get_class_from_dynamic_module resolve_trust_remote_code _read_safetensors_metadata_in_dir
    _download_mistral_config_file get_image_processor_config get_processor_config get_quant_config
    get_sparse_attention_config try_to_load_from_cache get_file_size Source
    """.split()
)
LISTS = frozenset("glob rglob iterdir listdir scandir".split())
OPENS = frozenset(
    "open exists is_file isfile is_dir isdir read_text read_bytes stat getsize".split()
)
WHOLE = frozenset({"torch.load", "os.walk"})
# What opens files here has nothing to do with models: caches, devices, kernels, media, processes.
NO_MODELS = (
    *("assets/", "collect_env.py", "compilation/", "connections.py", "device_allocator/"),
    *("distributed/", "env_override.py", "envs.py", "ir/", "kernels/", "logger.py"),
    *("model_executor/kernels/", "model_executor/warmup/", "multimodal/image.py"),
    *("multimodal/media/", "multimodal/video", "platforms/", "profiler/", "ray/", "snapshot/"),
    *("usage/", "utils/", "v1/", "vllm_flash_attn/"),
)
NOT_VLLMS_OWN = ("third_party/", "benchmarks/")


def package(name: str) -> Path:
    found = find_spec(name)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


class Calls(ast.NodeVisitor):
    """(function, line, what is called) of each call in a file."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, str, str]] = []
        self._around: list[str] = []

    def _enter(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self._around.append(node.name)
        self.generic_visit(node)
        self._around.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _enter

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        last = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        name = ".".join(self._around)
        # Most calls are of no interest, and to write one out takes longest.
        whole = ast.unparse(called) if last in {"load", "walk"} else last
        self.found.append((name, node.lineno, last, whole))
        self.generic_visit(node)


def calls(file: Path) -> list[tuple[str, int, str, str]]:
    visitor = Calls()
    visitor.visit(ast.parse(file.read_text()))
    return visitor.found


def in_vllm() -> Iterator[tuple[str, str, int]]:
    """(file, function, line of its first call) of what lists or opens files."""
    root = package("vllm")
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if file.startswith(NOT_VLLMS_OWN):
            continue
        generic = LISTS | OPENS if not file.startswith(NO_MODELS) else frozenset()
        # Parsing all of vLLM takes a minute.
        called = set(re.findall(r"\b(\w+)\(", path.read_text()))
        if not called & (MODELS | generic | ({"load", "walk"} if generic else set())):
            continue
        firsts: dict[str, int] = {}
        for function, line, last, whole in calls(path):
            if last in MODELS or last in generic or (generic and whole in WHOLE):
                firsts.setdefault(function, line)
        yield from ((file, function, line) for function, line in firsts.items())


@pytest.fixture(scope="module")
def installed() -> set[tuple[str, str, int]]:
    return set(in_vllm())


LISTED = {(read.file, read.function, read.line) for read in READS}


def test_every_place_in_vllm_is_listed(installed: set[tuple[str, str, int]]) -> None:
    """A new vLLM's new place must get an answer in the served directory first."""
    assert sorted(installed - LISTED) == []


def test_every_listed_place_is_in_vllm(installed: set[tuple[str, str, int]]) -> None:
    """At the line that the list names."""
    assert sorted(LISTED - installed) == []


def test_the_list_is_of_the_vllm_that_we_are_made_for() -> None:
    """Each place once, with an answer that is explained."""
    assert VLLM_VERSION == INSTALLED
    assert len(LISTED) == len(READS) > 150
    assert {read.answer for read in READS} == set(ANSWERS)


def test_what_is_listed_outside_of_vllm_is_known() -> None:
    """Tokenizers and processors: no other place there lists a directory."""
    site = package("vllm").parent
    files = {
        *(site / "mistral_common").rglob("*.py"),
        *(site / "transformers" / "models" / "auto").glob("*.py"),
        *(site / "transformers" / name for name in (
            "configuration_utils.py", "dynamic_module_utils.py", "feature_extraction_utils.py",
            "generation/configuration_utils.py", "image_processing_base.py", "processing_utils.py",
            "tokenization_mistral_common.py", "tokenization_utils_base.py",
            "tokenization_utils_tokenizers.py", "utils/hub.py", "video_processing_utils.py",
        )),
    }  # fmt: skip
    found = {
        (path.relative_to(site).as_posix(), function)
        for path in files
        for function, _, last, whole in calls(path)
        if last in LISTS or whole == "os.walk"
    }
    # Writes, to a hub.
    found -= {
        ("transformers/utils/hub.py", f"PushToHubMixin.{name}")
        for name in ("_get_files_timestamps", "_upload_modified_files")
    }
    assert found == {(listing.file, listing.function) for listing in OTHERS}
