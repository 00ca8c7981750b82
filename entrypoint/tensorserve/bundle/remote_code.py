"""Which Python files of a model does vLLM run with --trust-remote-code, and are they present?

Follows transformers 5: models/auto/*_auto.py (`auto_map`), dynamic_module_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from tensorserve.bundle.model_config import CONFIG, json_document

# The files that may have an `auto_map`.
NAMING_FILES = (
    CONFIG,
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
)
# transformers' own patterns for relative imports (`get_relative_imports`).
_RELATIVE = (
    re.compile(r"^\s*import\s+\.(\S+)\s*$", re.MULTILINE),
    re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE),
)
OWN_CONFIGURATIONS = frozenset(
    """
    RefinedWeb RefinedWebModel bagel bailing_moe_v3_vl chatglm colpali colqwen3 cosmos3_edge
    deepseek_v32 deepseek_v4 deepseek_v41 deepseek_vl_v2 dots3_note eagle funaudiochat hy_v4
    hyperclovax inkling_mm_model inkling_model isaac k3_dspark kimi_k2 kimi_k25 kimi_k3 kimi_linear
    kimi_vl medusa midashenglm minimax_m3_mtp minimax_m3_vl mlp_speculator modernvbert moondream3
    moss_transcribe_diarize muse_glimmer muse_glimmer_assistant muse_glimmer_text
    muse_glimmer_vision openvla ops_colqwen3 ovis qianfan_ocr qwen3_asr qwen3_vl_nemotron_embed
    speculators step3_text step3_vl step3p5 ultravox unlimited-ocr unlimited_ocr
    """.split()
)
"""Model types for which vLLM has its own configuration class and ignores `auto_map`:
`_CONFIG_REGISTRY` of vLLM 0.32.0's transformers_utils/config.py."""

# Architectures for which vLLM does so without a model type: `_ARCHITECTURE_TO_MODEL_TYPE` there.
_WITHOUT_MODEL_TYPE = {"LongcatFlashForCausalLM", "LongcatFlashNgramForCausalLM"}


@dataclass(frozen=True)
class Reference:
    """A class that `auto_map` names."""

    file: str
    """The file with the `auto_map`."""
    kind: str
    """AutoConfig, AutoTokenizer, AutoModelForCausalLM ..."""
    module: str
    """The Python file, relative to the model's directory."""
    repository: str | None = None
    """The Hugging Face repository with the file; None for this model."""


def references(names: Collection[str], read: Callable[[str], bytes]) -> tuple[Reference, ...]:
    """All classes in the `auto_map`s of the model's files `names`; `read` gives a file's content.

    Raises CorruptError for a file that is not JSON.
    """
    found = []
    for file in NAMING_FILES:
        if file not in names:
            continue
        document = json_document(file, read)
        named = document.get("auto_map") if isinstance(document, dict) else None
        if isinstance(named, list):  # the old form, for tokenizers only: [slow, fast]
            named = {"AutoTokenizer": named}
        if not isinstance(named, dict):
            continue
        for kind, classes in named.items():
            texts = classes if isinstance(classes, list) else [classes]
            if kind == "AutoTokenizer":
                # transformers loads the fast tokenizer if there is one, else the slow one.
                texts = [text for text in reversed(texts) if text][:1]
            found += [_reference(file, kind, text) for text in texts if isinstance(text, str)]
    return tuple(dict.fromkeys(found))


def needed(
    named: Collection[Reference], names: Collection[str], read: Callable[[str], bytes]
) -> tuple[Reference, ...]:
    """The classes of `named` that vLLM loads: those for which it has no class of its own.

    Raises CorruptError if config.json is not JSON.
    """
    config = json_document(CONFIG, read) if CONFIG in names else {}
    config = config if isinstance(config, dict) else {}
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    own_config = model_type in OWN_CONFIGURATIONS or (
        model_type is None and set(architectures[:1]) <= _WITHOUT_MODEL_TYPE and bool(architectures)
    )
    own_model = all(isinstance(name, str) and knows_architecture(name) for name in architectures)
    return tuple(
        one
        for one in named
        if not (
            (one.file == CONFIG and one.kind == "AutoConfig" and own_config)
            # For its own models, vLLM never loads the checkpoint's model class.
            or (one.kind.startswith("AutoModel") and own_model)
        )
    )


def missing_modules(
    wanted: Collection[Reference], names: Collection[str], read: Callable[[str], bytes]
) -> dict[str, str]:
    """The Python files that `names` lack, as {missing file: file that refers to it}.

    Relative imports are followed; `read` gives a file's content.
    """
    missing: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [(one.module, one.file) for one in wanted if one.repository is None]
    while waiting:
        module, by = waiting.pop(0)
        if module in seen:
            continue
        seen.add(module)
        if module not in names:
            missing[module] = by
            continue
        text = read(module).decode(errors="replace")
        folder = PurePosixPath(module).parent
        for pattern in _RELATIVE:
            for imported in pattern.findall(text):
                # As transformers does: "from .a.b import c" is the file "a.b.py". It does not copy
                # modules with more leading dots, so that those imports always fail.
                if not imported.startswith("."):
                    waiting.append((str(folder / f"{imported}.py"), module))
    return missing


def knows_architecture(name: str) -> bool:
    """Whether the installed vLLM has a model class for `name`; True if vLLM is not installed.

    vLLM's registry is read as text, because importing it takes seconds.
    """
    texts = _sources("vllm", "model_executor/models/registry.py")
    return not texts or any(f'"{name}":' in text for text in texts)


def knows_model_type(name: str) -> bool:
    """Whether vLLM or transformers have a configuration class for model type `name`.

    True if transformers is not installed.
    """
    if name in OWN_CONFIGURATIONS:
        return True
    folder = "models/auto"
    texts = _sources(
        "transformers", f"{folder}/auto_mappings.py", f"{folder}/configuration_auto.py"
    )
    return not texts or any(f'"{name}"' in text for text in texts)


def _sources(package: str, *files: str) -> list[str]:
    """The content of the existing ones of `files` in an installed package, without importing it."""
    spec = find_spec(package)
    places = (spec.submodule_search_locations or ()) if spec else ()
    paths = [Path(place, file) for place in places for file in files]
    return [path.read_text(encoding="utf-8") for path in paths if path.is_file()]


def _reference(file: str, kind: str, text: str) -> Reference:
    """Parses "module.Class" or "organisation/model--module.Class".

    Any other text becomes the file name itself, and so is reported as a missing file.
    """
    repository, dashes, rest = text.rpartition("--")
    module, _, name = rest.partition(".")
    file_name = f"{module}.py" if module and name and "." not in name else text
    return Reference(file, kind, file_name, repository if dashes else None)
