"""Does a bundle have all files that vLLM will open: configuration, tokenizer, code, modules?

`serve` checks the small files on its disk before vLLM starts, `check` those at the source, and
`pack` reports what a start would miss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tensorserve import sources
from tensorserve.bundle.adapters import adapters_of
from tensorserve.bundle.download import artifact_names
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.bundle.model_config import (
    CONFIG,
    MAX_CONFIG_BYTES,
    MISTRALS_CONFIG,
    json_document,
    json_object,
)
from tensorserve.bundle.nested_weights import MODULES
from tensorserve.bundle.remote_code import knows_model_type, missing_modules, needed, references
from tensorserve.bundle.tokenizer_files import TOKENIZERS, tokenizer_in
from tensorserve.config.access import access_for, has_key
from tensorserve.config.launch_plan import LaunchPlan, wants_adapters
from tensorserve.config.settings import Settings
from tensorserve.config.vllm_arguments import Argument
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.launch.preflight import Checked, Passed
from tensorserve.launch.trtllm_kernels import without_downloads
from tensorserve.sources import Access, ForbiddenError, NotFoundError
from tensorserve.telemetry import Check

Read = Callable[[str], bytes]
"""The content of a file of the bundle, by its name."""

_THREADS = 8
# vLLM 0.32.0, transformers_utils/config.py: `_ST_POOLING_MODULE_TYPES`, `_DENSE_MODULE_TYPES`.
_MODULES_WITH_SETTINGS = ("Pooling", "Dense")


def check_complete(names: Collection[str], read: Read, plan: LaunchPlan) -> tuple[str, ...]:
    """What was found, in words, among the bundle's files `names`. They are what vLLM will see.

    Raises CorruptError for what is missing or cannot be read, ConfigurationError for what a flag
    asks for and the bundle has not.
    """
    configs = [name for name in (CONFIG, MISTRALS_CONFIG) if name in names]
    if not configs:
        raise CorruptError(
            f"The bundle has no {CONFIG}.", hint="Pack the model with `tensorserve pack`."
        )
    for name in configs:
        json_object(name, read)
    found = [configs[0], _tokenizer(names, read, plan)]
    if plan.options.remote_code:
        found += _code(names, read, plan)
    elif plan.options.hf_overrides is None:
        _refuse_unknown(names, read)
    if not plan.options.pooler:
        _check_modules(names, read)
    return tuple(found)


def check_files(settings: Settings, plan: LaunchPlan, checked: Checked) -> Iterator[Passed]:
    """Every small file is at the source, as large as the manifest says, and vLLM needs no other.

    For `check`, which fetches none. Raises as `check_complete`, and the sources' errors.
    """
    access = access_for(settings)
    wanted = artifact_names(
        plan.bundle_uri,
        access,
        checked.weights.manifest,
        remote_code=plan.options.remote_code,
        sealed=has_key(settings),
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        there = pool.map(lambda name: _is_there(plan.bundle_uri, access, name, wanted), wanted)
        names = [name for name, is_there in zip(wanted, there, strict=True) if is_there]

    def read(name: str) -> bytes:
        source = sources.open_source(sources.join(plan.bundle_uri, name), access)
        try:
            if source.size > MAX_CONFIG_BYTES:
                raise CorruptError(
                    f"{source.name} has {source.size} bytes, more than {MAX_CONFIG_BYTES}; it was "
                    "to be read as JSON or Python."
                )
            return source.read(0, source.size)
        finally:
            source.close()

    found = check_complete(names, read, plan)
    yield Passed(Check.FILES, f"{len(names)} files, with {', '.join(found)}")
    if checked.gpus is not None and CONFIG in names:
        if adapters_of(checked.weights.manifest) and wants_adapters(plan):
            plan = plan.with_arguments(plan.arguments.adding(Argument("enable-lora")))
        _, replaced = without_downloads(plan, checked.gpus, json_object(CONFIG, read))
        yield Passed(Check.KERNELS, replaced or "those that vLLM prefers")


def _tokenizer(names: Collection[str], read: Read, plan: LaunchPlan) -> str:
    if not plan.options.tokenizer:
        return "no tokenizer, as asked for"
    if (found := tokenizer_in(names)) is not None:
        return found
    if plan.options.remote_code and any(
        one.kind == "AutoTokenizer" for one in references(names, read)
    ):
        return "a tokenizer of the model's own code"
    raise CorruptError(
        f"The bundle has no tokenizer ({TOKENIZERS}). vLLM would end, or serve one that knows no "
        "words.",
        hint="Pack the model again with its tokenizer beside config.json; or serve tokens alone, "
        "with TENSORSERVE_VLLM_SKIP_TOKENIZER_INIT=true.",
    )


def _code(names: Collection[str], read: Read, plan: LaunchPlan) -> list[str]:
    """Raises ConfigurationError where code is named that is not in the bundle."""
    named = references(names, read)
    wanted = needed(named, names, read)
    missing = missing_modules(wanted, names, read)
    if missing:
        module, by = next(iter(missing.items()))
        raise ConfigurationError(
            f"--trust-remote-code is on, and {by} names {module}, which is not in the bundle.",
            hint="Pack the model again with `tensorserve pack --trust-remote-code`, which takes "
            "its Python files along; or serve it without TENSORSERVE_VLLM_TRUST_REMOTE_CODE, where "
            "vLLM knows the model without.",
        )
    for one in wanted:
        if one.repository is not None and is_offline(plan) and not _is_cached(one.repository, plan):
            raise ConfigurationError(
                f"--trust-remote-code is on, and {one.file} names {one.module} of another model, "
                f"{one.repository}: nothing is fetched from the hub while serving.",
                hint="Copy that file and what it imports into the model's directory, write "
                f'"{Path(one.module).stem}.CLASS" without "{one.repository}--" in {one.file}, and '
                "pack the model again.",
            )
    modules = sorted(name for name in names if name.endswith(".py"))
    return [f"code ({', '.join(modules[:3])}{' …' if len(modules) > 3 else ''})"] if modules else []


def _refuse_unknown(names: Collection[str], read: Read) -> None:
    """Raises ConfigurationError for a model that vLLM can read with its own code alone."""
    own = [one for one in references(names, read) if (one.file, one.kind) == (CONFIG, "AutoConfig")]
    model_type = json_object(CONFIG, read).get("model_type") if own else None
    if isinstance(model_type, str) and not knows_model_type(model_type):
        raise ConfigurationError(
            f"{CONFIG} is of model type {model_type!r}, which vLLM and transformers do not know "
            f"without the model's own code ({own[0].module}), and --trust-remote-code is off.",
            hint="Read that code, pack the model with `tensorserve pack --trust-remote-code`, and "
            "set TENSORSERVE_VLLM_TRUST_REMOTE_CODE=true.",
        )


def is_offline(plan: LaunchPlan) -> bool:
    """Whether vLLM will ask no hub."""
    environ = dict(plan.environment)
    return environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def _is_cached(repository: str, plan: LaunchPlan) -> bool:
    environ = dict(plan.environment)
    home = environ.get("HF_HOME") or Path(environ.get("HOME", "/"), ".cache", "huggingface")
    cache = Path(environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    return any(cache.glob(f"models--{repository.replace('/', '--')}/snapshots/*/*.py"))


def _check_modules(names: Collection[str], read: Read) -> None:
    """Raises CorruptError where a module of sentence-transformers lacks its settings."""
    for name in missing_settings(names, read):
        raise CorruptError(
            f"{MODULES} names {name}, which is not in the bundle: vLLM would pool in the "
            "architecture's own way and give other vectors.",
            hint="Pack the whole directory again. Where the model has no such file, say how to "
            "pool with TENSORSERVE_VLLM_POOLER_CONFIG.",
        )


def missing_settings(names: Collection[str], read: Read) -> list[str]:
    """The settings that modules.json asks for and that are not there."""
    if MODULES not in names:
        return []
    document = json_document(MODULES, read)
    modules = document.get("modules") if isinstance(document, dict) else document
    missing: list[str] = []
    for module in modules if isinstance(modules, list) else []:
        if not isinstance(module, dict):
            continue
        kind, folder = str(module.get("type", "")).rpartition(".")[2], module.get("path")
        if kind in _MODULES_WITH_SETTINGS and isinstance(folder, str) and folder:
            missing.append(f"{folder.strip('/')}/config.json")
    return [name for name in missing if name not in names]


def what_a_start_misses(names: Collection[str], read: Read, *, code: bool) -> tuple[str, ...]:
    """Sentences for `pack` to print: what `check` will refuse, unless a flag says otherwise.

    `code`: Python files were asked for; then ConfigurationError where one that vLLM needs is not
    there.
    """
    said = []
    named = references(names, read)
    if tokenizer_in(names) is None and not any(one.kind == "AutoTokenizer" for one in named):
        said.append(
            "there is no tokenizer: it can be served with "
            "TENSORSERVE_VLLM_SKIP_TOKENIZER_INIT=true alone"
        )
    said += [
        f"{MODULES} names {name}, which is not there" for name in missing_settings(names, read)
    ]
    wanted = needed(named, names, read)
    if code:
        for module, by in missing_modules(wanted, names, read).items():
            raise ConfigurationError(
                f"{by} names {module}, which is not in the model's directory.",
                hint="Fetch the model again with its code, or pack it without --trust-remote-code.",
            )
    elif named:
        modules = sorted({one.module for one in named if one.repository is None})
        if modules:
            shown = ", ".join(modules[:3]) + (" …" if len(modules) > 3 else "")
            said.append(
                f"the model names code of its own ({shown}), which is left out; where vLLM needs "
                "it, read it, then pack with --trust-remote-code"
            )
    for one in wanted:
        if one.repository is not None:
            said.append(
                f"{one.file} names {one.module} of another model, {one.repository}, which nothing "
                "fetches while serving; copy it into the directory, with what it imports"
            )
    return tuple(dict.fromkeys(said))


def _is_there(uri: str, access: Access, name: str, wanted: dict[str, int | None]) -> bool:
    try:
        source = sources.open_source(sources.join(uri, name), access)
    except (NotFoundError, ForbiddenError):
        if wanted[name] is None:
            return False  # only a guess; some servers refuse what they do not have
        raise
    size = source.size
    source.close()
    if wanted[name] is not None and size != wanted[name]:
        raise CorruptError(
            f"{source.name} is {size} bytes, {MANIFEST} says {wanted[name]}.",
            hint="It was replaced or damaged. Upload the bundle again.",
        )
    return True
