"""How is a bundle loaded without `tensorserve serve`? By `LLM(**llm_kwargs(…))` or vLLM's options.

`llm_kwargs` checks and fetches what `serve` does and hands the start over in vLLM's loader
options, so that each `LLM` of a process loads its own model. Where vLLM was started without both,
the loader makes a start from vLLM's options and the environment.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensorserve import sources
from tensorserve.bundle.download import artifact_names
from tensorserve.bundle.draft import draft_file, draft_in
from tensorserve.bundle.manifest import Manifest
from tensorserve.bundle.nested_weights import nested_of
from tensorserve.bundle.verify import check_files_in_place
from tensorserve.config.access import access_for, has_key
from tensorserve.config.draft_model import check_draft, draft_from, local_bundle
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings, SourceSettings
from tensorserve.config.tensorizer_options import REFERENCE, environment_for
from tensorserve.config.tidying import tidy_process
from tensorserve.config.unwrapping import with_key
from tensorserve.config.variables import HANDOFF_VARIABLE
from tensorserve.errors import ConfigurationError
from tensorserve.format import KEY_SIZE
from tensorserve.launch.context import Start, publish_start, receive_start
from tensorserve.launch.lora_adapters import hold_adapters
from tensorserve.launch.preflight import (
    Weights,
    check_device,
    check_host_memory,
    check_memory,
    check_packed_draft,
    check_source,
    check_vllm,
    check_weights,
    visible_gpus,
)
from tensorserve.launch.served_directory import make_model_dir
from tensorserve.linux import no_core_files

_PREFIX = "TENSORSERVE_"
# Variables for `vllm serve`; refused here.
_FLAGS = "TENSORSERVE_VLLM_"


def llm_kwargs(
    model_uri: str | None = None,
    *,
    tensor_parallel_size: int = 1,
    speculative_config: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    **settings: object,
) -> dict[str, Any]:
    """The arguments with which vLLM's `LLM` loads a bundle: ``LLM(**llm_kwargs("s3://…"))``.

    `model_uri` is a directory of a bundle or a .tensors file: path, http(s)://, s3:// or another
    of sources/schemes.py. Each
    setting of docs/configuration.md may be given as an argument, in small letters and without its
    prefix (``key_file="key"``); what is not given comes from `environ` (os.environ). Other
    arguments of `LLM` are given to `LLM` itself. `speculative_config` is vLLM's; without a "model"
    the draft that was packed with the bundle is its model.

    Everything is checked, and configuration, tokenizer and adapters are fetched, before it
    returns; this process has to live as long as the `LLM`. Adapters of the bundle are in
    ``<model>/adapters/NAME``, for `LoRARequest`. Raises ConfigurationError, CorruptError and the
    sources' errors.
    """
    no_core_files()
    if environ is None:
        # botocore reads the process's environment itself, and fails for empty values.
        tidy_process()
    given = dict(os.environ if environ is None else environ)
    flags = [name for name in given if name.startswith(_FLAGS)]
    if flags:
        raise ConfigurationError(
            f"{flags[0]} is for `tensorserve serve`.",
            hint="Unset it, and give LLM() the argument itself.",
        )
    given.pop(HANDOFF_VARIABLE, None)
    if model_uri is not None:
        settings["model_uri"] = model_uri
    for name, value in settings.items():
        if value is not None:
            text = value.hex() if isinstance(value, bytes) else str(value)
            given[_PREFIX + name.upper()] = text
    if "TENSORSERVE_STATE_DIR" not in given:
        directory = tempfile.mkdtemp(prefix="tensorserve-")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        given["TENSORSERVE_STATE_DIR"] = directory
    read = Settings.from_environment(given)
    for warning in read.warnings:
        logging.getLogger(__name__).warning("%s", warning)
    # The other arguments of LLM() are not known here.
    plan = replace(
        make_plan(read, ("--tensor-parallel-size", str(tensor_parallel_size))), engine=()
    )
    check_vllm()
    ranks = plan.options.parallel.ranks
    gpus = visible_gpus(given)
    check_device(gpus, ranks)
    read = with_key(read, plan.bundle_uri)
    weights = check_source(read, plan)
    draft = draft_from(speculative_config or {})
    if draft is not None and draft.packed:
        weights = check_packed_draft(read, plan, plan.model_dir, weights)
    elif draft is not None:
        _, draft_bytes = check_draft(draft, read.model_uri, given)
        weights = replace(weights, draft_bytes=draft_bytes)
    _warn(weights)
    # LLM() may quantize the weights, or leave a part of them in host memory.
    check_memory(weights.data_bytes + weights.draft_bytes, ranks, gpus, whole=False)
    limit, _ = check_host_memory(read, plan, weights)
    read = replace(read, host_memory_limit=limit)
    make_model_dir(plan, read, weights.manifest, weights.index)
    hold_adapters(plan.bundle_uri, plan.model_dir, read, weights.manifest)
    reference = publish_start(Start(read, plan, weights.shards, draft=weights.draft))
    kwargs = {
        "model": str(plan.model_dir),
        "load_format": "tensorizer",
        "tensor_parallel_size": tensor_parallel_size,
        "model_loader_extra_config": {REFERENCE: reference},
    }
    if speculative_config is not None:
        packed = {} if weights.draft is None else {"model": weights.draft.directory}
        kwargs["speculative_config"] = dict(speculative_config) | packed
    return kwargs


def handed_over_start(
    extra: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> Start | None:
    """The start that `llm_kwargs` or `tensorserve serve` has left for this loader, if any.

    `environ`: os.environ, where the latter's reference is.
    """
    environ = os.environ if environ is None else environ
    reference = extra.get(REFERENCE) or environ.get(HANDOFF_VARIABLE)
    return receive_start(reference) if reference else None


def settings_environment(
    extra: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """vLLM's options over `environ` (os.environ), for a vLLM that was started without us.

    Raises ConfigurationError for what has no meaning.
    """
    environ = os.environ if environ is None else environ
    inherited = {name: v for name, v in environ.items() if not name.startswith(_FLAGS)}
    options = environment_for(extra)
    if "TENSORSERVE_KEY_FILE" in options:
        # An option is more specific than a variable: it wins over any other key.
        for name in ("KEY", "KEY_FILE", "KEY_URI", "PASSPHRASE", "PASSPHRASE_FILE"):
            inherited.pop(_PREFIX + name, None)
        if "://" in options["TENSORSERVE_KEY_FILE"]:
            # vLLM takes an address here.
            uri = options.pop("TENSORSERVE_KEY_FILE")
            options["TENSORSERVE_KEY"] = _fetch_key(uri, inherited | options)
    if {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= options.keys():
        # Removed as a whole: a token or file of the environment belongs to other credentials.
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
            for prefix, suffix in itertools.product(("AWS_", "S3_"), ("", "_FILE")):
                inherited.pop(prefix + name + suffix, None)
    return inherited | options


def own_start(
    environ: Mapping[str, str],
    ranks: int,
    model: str = "",
    *,
    remote_code: bool = False,
    draft: str | None = None,
) -> Start:
    """A start from `environ` for a loader without one: checked here, in each rank.

    vLLM has read configuration and tokenizer by then, from the directory `model`. Where that is
    the bundle's own, they are compared with an authenticated manifest now, `remote_code` as well:
    CorruptError before a request can be answered. Code that is not authenticated is refused there
    where a key is set. `draft`: the directory of what drafts; it may be that of the bundle's own.
    """
    tidy_process()
    settings = Settings.from_environment(environ)
    plan = replace(make_plan(settings, ("--tensor-parallel-size", str(ranks))), engine=())
    settings = with_key(settings, plan.bundle_uri)
    weights = check_weights(settings, plan)
    bundle, manifest = local_bundle(settings.model_uri), weights.manifest
    own = bundle is not None and os.path.realpath(model) == os.path.realpath(bundle)
    if bundle is not None and draft is not None and _is_packed_in(bundle, draft, manifest):
        weights = check_packed_draft(settings, plan, Path(bundle), weights)
        assert weights.draft is not None
        # As vLLM names it.
        weights = replace(weights, draft=replace(weights.draft, directory=draft))
        own = True
    if own and (nested := nested_of(manifest)):
        raise ConfigurationError(
            f"The bundle has {nested[0]} sealed, which vLLM reads as a file of its model's "
            "directory: this vLLM was started on the bundle itself, and has not found it.",
            hint="Start it with `tensorserve up`, or LLM(**llm_kwargs(…)): they make a directory "
            "with all that vLLM reads.",
        )
    if bundle is not None and own and manifest is not None and manifest.authenticated_by:
        check_files_in_place(bundle, manifest, remote_code=remote_code)
    elif own and remote_code and has_key(settings):
        artifact_names(plan.bundle_uri, access_for(settings), None, remote_code=True, sealed=True)
    _warn(weights)
    limit, _ = check_host_memory(settings, plan, weights)
    settings = replace(settings, host_memory_limit=limit)
    return Start(settings, plan, weights.shards, draft=weights.draft)


def _is_packed_in(bundle: str, draft: str, manifest: Manifest | None) -> bool:
    name = draft_in(manifest)
    if name is None:
        return False
    return os.path.realpath(draft) == os.path.realpath(Path(bundle, draft_file(name, "")))


def _warn(weights: Weights) -> None:
    if weights.warning is not None:
        logging.getLogger(__name__).warning("%s", weights.warning)


def _fetch_key(uri: str, environ: Mapping[str, str]) -> str:
    """The key in the file at `uri`, in hex."""
    source = sources.open_source(uri, access_for(SourceSettings.from_environment(environ)))
    try:
        if source.size != KEY_SIZE:
            raise ConfigurationError(
                f"{source.name} has {source.size} bytes; a key has {KEY_SIZE}.",
                hint="Is encryption_keyfile the address of the key?",
            )
        return source.read(0, KEY_SIZE).hex()
    finally:
        source.close()
