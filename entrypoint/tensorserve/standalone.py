"""Loads without `tensorserve serve`: `LLM(**llm_kwargs(…))`, and vLLM's own commands and options.

`llm_kwargs` checks and fetches what `serve` does and hands the start over in vLLM's loader
options, so that each `LLM` of a process loads its own model. Where vLLM was started without it,
the loader makes a start of vLLM's options and the environment.
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
from typing import Any

from tensorserve import sources
from tensorserve.adapters import hold_adapters
from tensorserve.artifacts import artifact_names, fetch_artifacts
from tensorserve.drafts import local_bundle
from tensorserve.errors import ConfigurationError
from tensorserve.format import KEY_SIZE
from tensorserve.linux import no_core_files
from tensorserve.opening import access_for, has_key
from tensorserve.plan import LaunchPlan, make_plan
from tensorserve.preflight import (
    Weights,
    check_device,
    check_host_memory,
    check_memory,
    check_source,
    check_vllm,
    check_weights,
    visible_gpus,
)
from tensorserve.ranks import Ranks
from tensorserve.settings import HANDOFF_VARIABLE, Settings
from tensorserve.start import Start, publish_start, receive_start
from tensorserve.tensorizer_options import REFERENCE, environment_for
from tensorserve.verifying import check_files_in_place

_PREFIX = "TENSORSERVE_"
# Of this one process; TENSORSERVE_VLLM_… are for `vllm serve`.
_FLAGS = "TENSORSERVE_VLLM_"


def llm_kwargs(
    model_uri: str | None = None,
    *,
    tensor_parallel_size: int = 1,
    environ: Mapping[str, str] | None = None,
    **settings: object,
) -> dict[str, Any]:
    """The arguments with which vLLM's `LLM` loads a bundle: ``LLM(**llm_kwargs("s3://…"))``.

    `model_uri` is a directory of a bundle or a .tensors file: path, http(s)://, s3://. Each
    setting of docs/configuration.md may be given as an argument, in small letters and without its
    prefix (``key_file="key"``); what is not given comes from `environ` (os.environ). Other
    arguments of `LLM` are given to `LLM` itself.

    Everything is checked, and configuration, tokenizer and adapters are fetched, before it
    returns; this process has to live as long as the `LLM`. Adapters of the bundle are in
    ``<model>/adapters/NAME``, for `LoRARequest`. Raises ConfigurationError, CorruptError and the
    sources' errors.
    """
    no_core_files()
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
    # What else LLM() is given, it alone knows.
    plan = replace(make_plan(read), tensor_parallel_size=tensor_parallel_size, engine=())
    check_vllm()
    ranks = Ranks(tensor_parallel_size, tensor_parallel_size)
    gpus = visible_gpus(given)
    check_device(gpus, ranks)
    weights = Weights()
    for _ in check_source(read, plan, weights, None):
        pass
    _warn(weights)
    # LLM() may be told to quantize them, or to leave a part in host memory.
    check_memory(weights.data_bytes, ranks, gpus, whole=False)
    check_host_memory(read, plan, weights)
    read = replace(read, host_memory_limit=weights.host_memory_limit)
    fetch_artifacts(plan.bundle_uri, access_for(read), plan.model_dir, weights.manifest)
    hold_adapters(plan.bundle_uri, plan.model_dir, read, weights.manifest)
    reference = publish_start(given, read, (), weights.shards)
    return {
        "model": str(plan.model_dir),
        "load_format": "tensorizer",
        "tensor_parallel_size": tensor_parallel_size,
        "model_loader_extra_config": {REFERENCE: reference},
    }


def handed_over_start(extra: Mapping[str, Any], environ: Mapping[str, str]) -> Start | None:
    """The start that `llm_kwargs` or `tensorserve serve` has left for this loader, if any."""
    reference = extra.get(REFERENCE) or environ.get(HANDOFF_VARIABLE)
    return receive_start(reference) if reference else None


def settings_environment(extra: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """vLLM's options over the environment. Raises ConfigurationError for what has no meaning."""
    inherited = {name: v for name, v in environ.items() if not name.startswith(_FLAGS)}
    options = environment_for(extra)
    if "TENSORSERVE_KEY_FILE" in options:
        # As the more specific wish, it wins over any other key.
        for name in ("KEY", "KEY_FILE", "PASSPHRASE", "PASSPHRASE_FILE"):
            inherited.pop(_PREFIX + name, None)
        if "://" in options["TENSORSERVE_KEY_FILE"]:
            # vLLM takes an address here.
            uri = options.pop("TENSORSERVE_KEY_FILE")
            options["TENSORSERVE_KEY"] = _fetch_key(uri, inherited | options)
    if {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= options.keys():
        # Whole, or a token or a file of the environment would be taken for part of them.
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
            for prefix, suffix in itertools.product(("AWS_", "S3_"), ("", "_FILE")):
                inherited.pop(prefix + name + suffix, None)
    return inherited | options


def own_start(
    environ: Mapping[str, str], ranks: int, model: str = "", *, remote_code: bool = False
) -> Start:
    """A start of `environ` for a loader that nobody started: checked here, in each rank.

    vLLM has read configuration and tokenizer by then, from the directory `model`. Where that is
    the bundle's own, they are compared with an authenticated manifest now, `remote_code` as well:
    CorruptError before a request can be answered. Code that nobody vouches for is refused there
    where a key is set.
    """
    settings = Settings.from_environment(environ)
    plan: LaunchPlan = replace(make_plan(settings), tensor_parallel_size=ranks, engine=())
    weights = Weights()
    for _ in check_weights(settings, plan, weights, None):
        pass
    bundle, manifest = local_bundle(settings.model_uri), weights.manifest
    own = bundle is not None and os.path.realpath(model) == os.path.realpath(bundle)
    if bundle is not None and own and manifest is not None and manifest.vouched_by:
        check_files_in_place(bundle, manifest, remote_code=remote_code)
    elif own and remote_code and has_key(settings):
        artifact_names(plan.bundle_uri, access_for(settings), None, remote_code=True, sealed=True)
    _warn(weights)
    check_host_memory(settings, plan, weights)
    settings = replace(settings, host_memory_limit=weights.host_memory_limit)
    return Start(settings, (), weights.shards, frozenset(os.sched_getaffinity(0)))


def _warn(weights: Weights) -> None:
    if weights.warning is not None:
        logging.getLogger(__name__).warning("%s", weights.warning)


def _fetch_key(uri: str, environ: Mapping[str, str]) -> str:
    """The key in the file at `uri`, in hex."""
    source = sources.open_source(uri, access_for(Settings.from_environment(environ)))
    try:
        if source.size != KEY_SIZE:
            raise ConfigurationError(
                f"{source.name} has {source.size} bytes; a key has {KEY_SIZE}.",
                hint="Is encryption_keyfile the address of the key?",
            )
        return source.read(0, KEY_SIZE).hex()
    finally:
        source.close()
