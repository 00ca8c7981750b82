"""What does vLLM need in order to serve adapters that are found while it serves?

Its own resolver interface (vllm/lora/resolver.py, 0.32.0) is asked only where
VLLM_ALLOW_RUNTIME_LORA_UPDATING is set. That also opens routes by which a client loads any
directory; our middleware (engine/adapters/middleware.py) keeps those closed.
"""

from __future__ import annotations

from collections.abc import Mapping

from tensorserve.config.settings import Settings
from tensorserve.config.vllm_arguments import Argument, Arguments
from tensorserve.config.vllm_options import options_of
from tensorserve.errors import ConfigurationError

# As `vllm serve --middleware` wants it.
MIDDLEWARE = "tensorserve.engine.adapters.middleware.ServeAdapters"
UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
MAX_LORAS, MAX_LORA_RANK = 4, 32
"""vLLM's own defaults are 1, so that requests for two adapters wait for each other, and 16."""
_URI = "TENSORSERVE_ADAPTERS_URI"
# vLLM's other resolvers take adapters that nobody has authenticated, under any name.
_OTHER_RESOLVERS = ("VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_LORA_RESOLVER_HF_REPO_LIST")
_NO_RESOLVER = {
    "grpc": "vLLM's gRPC server finds no adapters",
    "headless": "a headless vLLM answers no requests",
}


def flags_for_adapters(
    arguments: Arguments, settings: Settings, environment: Mapping[str, str]
) -> tuple[Argument, ...]:
    """The arguments that are missing for adapters of TENSORSERVE_ADAPTERS_URI; () without one.

    `environment`: what the engine inherits. Raises ConfigurationError for arguments and variables
    with which no adapter could be found or loaded, or others than those of the store.
    """
    if settings.adapters_uri is None:
        return ()
    _refuse(arguments, environment)
    wanted = [
        Argument("enable-lora"),
        Argument("max-loras", (str(MAX_LORAS),)),
        Argument("max-lora-rank", (str(MAX_LORA_RANK),)),
    ]
    slots = arguments.value("max-loras") or str(MAX_LORAS)
    if slots.isdecimal() and len(slots) < 6:
        # Else vLLM reads an adapter again, between two steps, whenever it is the next one's turn.
        held = max(settings.adapters_count, int(slots))
        wanted.append(Argument("max-cpu-loras", (str(held),)))
    if options_of(arguments).parallel.data > 1:
        # Each API server would load adapters of its own; vLLM refuses to start with several.
        wanted.append(Argument("api-server-count", ("1",)))
    return tuple(argument for argument in wanted if argument.name not in arguments.names)


def _refuse(arguments: Arguments, environment: Mapping[str, str]) -> None:
    options = options_of(arguments)
    if options.lora is False:
        raise ConfigurationError(
            f"{_URI} is set, and LoRA is switched off (--no-enable-lora).",
            hint="Unset one of them: TENSORSERVE_VLLM_ENABLE_LORA=false serves no adapter.",
        )
    servers = arguments.value("api-server-count")
    if servers not in {None, "1"}:
        raise ConfigurationError(
            f"{_URI} is set, and --api-server-count is {str(servers)[:40]}: an adapter would be "
            "found by one of the API servers, and unknown to the others.",
            hint="Leave --api-server-count away; one server is started.",
        )
    if options.parallel.nodes > 1:
        raise ConfigurationError(
            f"{_URI} is set, and the model's ranks are on {options.parallel.nodes} machines: an "
            "adapter is held in the memory of one.",
            hint="Serve the model on one machine, or pack its adapters with it (`pack --lora`).",
        )
    for name, why in _NO_RESOLVER.items():
        if arguments.switch(name):
            raise ConfigurationError(
                f"{_URI} is set with --{name}: {why}.",
                hint=f"Leave --{name} away, or unset {_URI}.",
            )
    if environment.get("VLLM_USE_RUST_FRONTEND", "") not in {"", "0", "false", "False"}:
        raise ConfigurationError(
            f"{_URI} is set with VLLM_USE_RUST_FRONTEND, which finds no adapters.",
            hint=f"Unset VLLM_USE_RUST_FRONTEND, or unset {_URI}.",
        )
    if UPDATING in environment:
        raise ConfigurationError(
            f"{UPDATING} and {_URI} are both set: the first opens routes that load any directory.",
            hint=f"Unset {UPDATING}: what adapters need of it is set with {_URI}.",
        )
    for name in _OTHER_RESOLVERS:
        if environment.get(name):
            raise ConfigurationError(
                f"{name} and {_URI} are both set: vLLM would take adapters that nobody has "
                "authenticated.",
                hint=f"Unset {name}.",
            )
