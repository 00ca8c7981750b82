"""What is in the directory that vLLM is started on?

All that vLLM would find in the original model's directory: configuration, tokenizer and code from
the bundle (bundle/download.py); headers where the weights
were (bundle/stand_ins.py); and the weights that vLLM reads as files itself, in memory
(bundle/nested_weights.py). What vLLM looks for, and where, is in launch/directory_reads.py.
"""

from __future__ import annotations

from tensorserve import sources
from tensorserve.bundle.download import (
    MAX_FILE_BYTES,
    STAND_IN_SUFFIX,
    artifact_names,
    fetch_artifacts,
    resolve_below,
)
from tensorserve.bundle.manifest import Manifest
from tensorserve.bundle.model_config import CONFIG, MISTRALS_CONFIG
from tensorserve.bundle.nested_weights import (
    MODULES,
    PICKLED_CLASS,
    bundle_name,
    check_dense,
    nested_of,
)
from tensorserve.bundle.not_a_bundle import explain_refused, refuse_web_page
from tensorserve.bundle.stand_ins import check_stand_in, stand_in_of_index
from tensorserve.config.access import access_for, has_key
from tensorserve.config.launch_plan import LaunchPlan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import FileIndex
from tensorserve.launch.held_weights import check_room, holder_of
from tensorserve.secret import redact_uri
from tensorserve.sources import Access, ForbiddenError, NotFoundError

_NO_MEMORY_HINT = "Raise it: they stay in memory, where vLLM reads them."


def make_model_dir(
    plan: LaunchPlan, settings: Settings, manifest: Manifest | None, index: FileIndex | None
) -> tuple[str, ...]:
    """Put what vLLM reads into the plan's model directory, and give the names of its files.

    What is held in memory stays as long as this process. `index` is that of the weights' first
    file. Raises CorruptError for what is not as it was packed or is missing, ConfigurationError
    where there is no room, and the sources' errors.
    """
    written = fetch_artifacts(
        plan.bundle_uri,
        access_for(settings),
        plan.model_dir,
        manifest,
        remote_code=plan.options.remote_code,
        sealed=has_key(settings),
    )
    named = [name for name in written if name.endswith(STAND_IN_SUFFIX)]
    for name in named:
        check_stand_in(plan.model_dir / name)
    if not any("/" not in name for name in named) and index is not None:
        made = stand_in_of_index(index, mistral=CONFIG not in written)
        if made is not None:
            (plan.model_dir / made.name).write_bytes(made.data)
    _hold_nested(plan, settings, manifest)
    modules = plan.model_dir / MODULES
    if modules.is_file():
        there = {*written, *nested_of(manifest)}
        check_dense(modules.read_bytes(), f"{redact_uri(plan.bundle_uri)}: {MODULES}", there)
    return (*written, *nested_of(manifest))


def check_model_dir(
    plan: LaunchPlan, settings: Settings, manifest: Manifest | None, weights: str
) -> str:
    """As far as it is known before: `make_model_dir` will find what it needs. Gives what is there.

    `weights`: the URI of one of the files of weights, which can be read. Raises CorruptError,
    ConfigurationError and the sources' errors.
    """
    access = access_for(settings)
    config = _config_of(plan.bundle_uri, access, weights)
    remote_code, sealed = plan.options.remote_code, has_key(settings)
    names = artifact_names(
        plan.bundle_uri, access, manifest, remote_code=remote_code, sealed=sealed
    )
    nested = nested_of(manifest)
    if manifest is not None:
        _check_nested_room(nested, manifest, settings)
    overrides = plan.options.hf_overrides or ""
    if PICKLED_CLASS in overrides:
        raise ConfigurationError(
            f"--hf-overrides asks for vLLM's {PICKLED_CLASS}, which reads pickles beside the "
            "weights; none are in a bundle.",
            hint="Leave it out: the model's dense vectors need neither.",
        )
    if MODULES in names:
        modules = _read(plan.bundle_uri, MODULES, access)
        if modules is not None:
            there = {*names, *nested}
            check_dense(modules, f"{redact_uri(plan.bundle_uri)}: {MODULES}", there)
    return f"{config} is there"


def _hold_nested(plan: LaunchPlan, settings: Settings, manifest: Manifest | None) -> None:
    names = nested_of(manifest)
    if manifest is None or not names:
        return
    _check_nested_room(names, manifest, settings)
    holder = holder_of(plan.bundle_uri, settings, manifest)
    for name in names:
        link = resolve_below(plan.model_dir, name)
        link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        link.unlink(missing_ok=True)  # the stand-in of a file at the root
        holder.hold(bundle_name(name), link)


def _check_nested_room(names: tuple[str, ...], manifest: Manifest, settings: Settings) -> None:
    entries = [manifest.tensors_files[bundle_name(name)] for name in names]
    check_room(entries, settings, "nested weights", _NO_MEMORY_HINT)


def _config_of(bundle_uri: str, access: Access, weights: str) -> str:
    """Without a configuration vLLM fails after a minute of imports."""
    refused: ForbiddenError | None = None
    for name in (CONFIG, MISTRALS_CONFIG):
        try:
            source = sources.open_source(sources.join(bundle_uri, name), access)
        except NotFoundError:
            continue
        except ForbiddenError as error:
            refused = refused or error
            continue
        try:
            refuse_web_page(source.name, source.read(0, min(source.size, 1024)))
        finally:
            source.close()
        return name
    if refused is not None:
        raise explain_refused(bundle_uri, access, weights, refused) from refused
    raise CorruptError(
        f"The bundle has no config.json: {redact_uri(sources.join(bundle_uri, CONFIG))}",
        hint="vLLM needs the model's config.json (and its tokenizer) beside the .tensors file. "
        "Pack the model with `tensorserve pack`, or copy them there.",
    )


def _read(bundle_uri: str, name: str, access: Access) -> bytes | None:
    try:
        source = sources.open_source(sources.join(bundle_uri, name), access)
    except (NotFoundError, ForbiddenError):
        return None  # only a guess, where a source cannot list
    try:
        return source.read(0, min(source.size, MAX_FILE_BYTES))
    finally:
        source.close()
