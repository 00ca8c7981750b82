"""What will be started? Settings → LaunchPlan, without touching a file, socket or process."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tensorserve.bundle.location import SHARD_PATTERN, served_name_of, shard_name, split_model_uri
from tensorserve.config import adapter_flags, vllm_flags
from tensorserve.config.access import services_for
from tensorserve.config.compile_caches import cache_root, cache_variables
from tensorserve.config.draft_model import Draft
from tensorserve.config.health_url import health_url
from tensorserve.config.settings import Settings
from tensorserve.config.signature import trust_for
from tensorserve.config.value_parsers import parse_host
from tensorserve.config.vllm_arguments import Argument, Arguments, parse_arguments
from tensorserve.config.vllm_options import VllmOptions, options_of
from tensorserve.errors import ConfigurationError
from tensorserve.secret import REDACTED, Secret, redact_text, redact_uri
from tensorserve.telemetry.probe import TLS
from tensorserve.wrapping.base import Reference
from tensorserve.wrapping.providers import shown

# Few enough digits for int(), which refuses more than 4,300 in its own words.
_WHOLE = re.compile(r"[0-9]{1,18}")
# What vLLM's --max-lora-rank may be (vllm/config/lora.py, 0.32.0), and is by default.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_LORA_RANK = 16
_MODULES, _RANK = "lora-modules", "max-lora-rank"
# vLLM's server stays up when its engine has died (vllm/entrypoints/launchers/launcher.py).
_KEPT_ALIVE = "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"
# As `vllm serve --middleware` wants it: engine/api_key.py.
API_KEY_MIDDLEWARE = "tensorserve.engine.api_key.RequireKey"
# As parts of a variable's name.
_SECRET_WORDS = frozenset({"KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS", "HEADER"})


@dataclass(frozen=True)
class LaunchPlan:
    """The start, as plain data."""

    arguments: Arguments
    """Of `vllm serve`, after the model's directory; no secret is in them."""
    options: VllmOptions
    """What the arguments say that a start has to know."""
    environment: tuple[tuple[str, str], ...] = field(repr=False)
    """Everything that the engine inherits."""
    secret_flags: tuple[tuple[str, Secret], ...]
    """Flags that vLLM reads from memory instead of its arguments (its API key)."""
    bundle_uri: str
    """Where configuration and tokenizer are."""
    tensors: tuple[str, ...]
    """Candidates for the weights, best first; "%03d" stands for a rank."""
    model_dir: Path
    """Where configuration and tokenizer are put for vLLM."""
    served_name: str
    health_url: str
    """How the engine is probed, see telemetry/probe.py."""
    host: str
    port: int
    engine: tuple[tuple[str, bool | int | str], ...] = ()
    """What the flags say of the engine's fingerprint (bundle/engine_fingerprint.py) beside the size
    above.
    """
    chosen_for_adapters: tuple[str, ...] = ()
    """Words of `arguments` that TENSORSERVE_ADAPTERS_URI has added."""

    @property
    def argv(self) -> tuple[str, ...]:
        """`vllm serve …`, word by word."""
        return ("vllm", "serve", str(self.model_dir), *self.arguments.words())

    @property
    def tensor_parallel_size(self) -> int:
        """How many ranks share each layer."""
        return self.options.parallel.tensor

    def with_arguments(self, arguments: Arguments) -> LaunchPlan:
        """The plan of `arguments`. Raises ConfigurationError for what vLLM could not read."""
        return replace(self, arguments=arguments, options=options_of(arguments))

    def shards(self, template: str) -> tuple[str, ...]:
        """The files that `template` means: one a rank, or the one file of all ranks."""
        if not SHARD_PATTERN.search(template):
            return (template,)
        return tuple(shard_name(template, rank) for rank in range(self.tensor_parallel_size))


def make_plan(settings: Settings, arguments: tuple[str, ...] = ()) -> LaunchPlan:
    """The plan for `settings`, with `arguments` (what stood after `--`) added to `vllm serve`.

    Arguments win over variables. Raises ConfigurationError for those that we must own.
    """
    given = parse_arguments(arguments)
    for name in vllm_flags.OWNED:
        if name in given.names:
            raise ConfigurationError(
                f"--{name} cannot be given.", hint=f"{vllm_flags.OWNED[name]}."
            )
    host = given.value("host")
    host = settings.host if host is None else parse_host(host, "--host")
    port = settings.port if (text := given.value("port")) is None else _port(text)
    model_dir = settings.state_dir / "model"
    bundle_uri, tensors = split_model_uri(settings.model_uri)
    served_name = settings.model_name or served_name_of(settings.model_uri)
    ours = [Argument("load-format", ("tensorizer",))]
    ours += [
        Argument(name, (value,))
        for name, value in (("served-model-name", served_name), ("host", host), ("port", str(port)))
        if name not in given.names
    ]
    merged = Arguments((*ours, *settings.flags.without(*given.names).given))
    merged = merged.adding(*given.without(*vllm_flags.SECRET).given)
    secret_flags = _secret_flags(settings, given)
    environment = _engine_environment(settings)
    chosen = adapter_flags.flags_for_adapters(merged, settings, dict(settings.environment))
    merged = merged.adding(*chosen)
    if settings.adapters_uri is not None:
        merged = merged.adding(Argument("middleware", (adapter_flags.MIDDLEWARE,)))
    if any(name == "api-key" for name, _ in secret_flags):
        _refuse_unguarded_doors(merged, dict(environment))
        # vLLM calls the last one first.
        merged = merged.adding(Argument("middleware", (API_KEY_MIDDLEWARE,)))
    probed_at = health_url(merged.value, lambda name: bool(merged.switch(name)), host, port)
    if probed_at.startswith(TLS) and _is_on(dict(environment).get(_KEPT_ALIVE, "")):
        raise ConfigurationError(
            f"{_KEPT_ALIVE} keeps a server whose engine is dead, and --ssl-cert-reqs=2 leaves only "
            "the server to be asked: it would be ready for ever.",
            hint=f"Unset {_KEPT_ALIVE}.",
        )
    options = options_of(merged)
    return LaunchPlan(
        arguments=merged,
        options=options,
        environment=environment,
        secret_flags=secret_flags,
        bundle_uri=bundle_uri,
        tensors=tensors,
        model_dir=model_dir,
        served_name=given.value("served-model-name") or served_name,
        health_url=probed_at,
        host=host,
        port=port,
        engine=_engine(options),
        chosen_for_adapters=tuple(word for argument in chosen for word in argument.words()),
    )


def _port(text: str) -> int:
    if _WHOLE.fullmatch(text) and 0 < int(text) < 65536:
        return int(text)
    raise ConfigurationError(f"--port {text[:40]!r} is not a port.", hint="Use 1 to 65535.")


def _secret_flags(settings: Settings, given: Arguments) -> tuple[tuple[str, Secret], ...]:
    """What was given as an argument wins over a variable."""
    found = list(settings.secret_flags)
    for name in sorted(vllm_flags.SECRET):
        argument = given.last(name)
        # Without a value (--hf-token alone) nothing else is given than by the variable.
        if argument is not None and argument.values:
            found = [(one, secret) for one, secret in found if one != name]
            origin = f"--{name} argument"
            found += [(name, Secret(value, origin=origin)) for value in argument.values]
    return tuple(found)


def _refuse_unguarded_doors(arguments: Arguments, environment: Mapping[str, str]) -> None:
    """With an API key, refuse servers that would answer without it."""
    for name in ("grpc", "grpc-port"):
        if arguments.switch(name):
            raise ConfigurationError(
                f"--{name} serves without the API key that is set.",
                hint=f"Leave --{name} away, or unset the key and guard the port otherwise.",
            )
    if _is_on(environment.get("VLLM_USE_RUST_FRONTEND", "")):
        raise ConfigurationError(
            "VLLM_USE_RUST_FRONTEND takes no middleware: it would leave most of its routes open, "
            "and an API key is set.",
            hint="Unset VLLM_USE_RUST_FRONTEND, or unset the key and guard the port otherwise.",
        )


def _is_on(text: str) -> bool:
    return text not in {"", "0", "false", "False"}


def _engine(options: VllmOptions) -> tuple[tuple[str, bool | int | str], ...]:
    parallel = options.parallel
    fields: dict[str, bool | int | str] = {
        "pipeline_parallel_size": parallel.pipeline,
        "expert_parallel": parallel.experts,
    }
    if options.dtype is not None:
        fields["dtype"] = options.dtype
    return tuple(fields.items())


def wants_adapters(plan: LaunchPlan) -> bool:
    """Whether a bundle's adapters are to be served: unless the user said --no-enable-lora."""
    return plan.options.lora is not False


def with_adapters(plan: LaunchPlan, adapters: Sequence[tuple[str, Path, int]]) -> LaunchPlan:
    """The plan that serves `adapters` (name, directory, rank) too. What the user gave wins."""
    if not adapters:
        return plan
    arguments = plan.arguments
    if plan.options.lora is None:
        arguments = arguments.adding(Argument("enable-lora"))
    rank = max(rank for _, _, rank in adapters)
    default = _DEFAULT_LORA_RANK
    if f"--{_RANK}={adapter_flags.MAX_LORA_RANK}" in plan.chosen_for_adapters:
        default = adapter_flags.MAX_LORA_RANK
        arguments = arguments.without(_RANK) if rank > default else arguments
    if _RANK not in arguments.names and rank > default:
        fitting = [allowed for allowed in _LORA_RANKS if allowed >= rank]
        if not fitting:
            raise ConfigurationError(
                f"An adapter is of rank {rank}; vLLM serves up to {_LORA_RANKS[-1]}."
            )
        arguments = arguments.adding(Argument(_RANK, (str(fitting[0]),)))
    modules = [
        json.dumps({"name": name, "path": str(path), "base_model_name": plan.served_name})
        for name, path, _ in adapters
    ]
    # vLLM takes the last --lora-modules only: the user's own are repeated in it.
    own = arguments.last(_MODULES)
    modules += own.values if own is not None else ()
    arguments = arguments.without(_MODULES).adding(Argument(_MODULES, tuple(modules)))
    return plan.with_arguments(arguments)


def describe(plan: LaunchPlan, settings: Settings) -> dict[str, object]:
    """The plan for a person or a program to read, secrets redacted."""
    bundle = redact_uri(plan.bundle_uri)
    return {
        "settings": dict(settings.shown()),
        "bundle": bundle,
        # Redacted as the URI is, which may have a password in its last part.
        "weights": [
            redact_uri(f"{plan.bundle_uri.partition('?')[0]}/{template}").rpartition("/")[2]
            for template in plan.tensors
        ],
        "model_directory": str(plan.model_dir),
        "key": _shown_key(settings),
        **_shown_trust(settings),
        **_shown_draft(plan.options.draft),
        **_shown_adapters(plan, settings),
        "command": [redact_text(word) for word in plan.argv],
        "secrets_in_memory": sorted(
            [f"--{name}" for name, _ in plan.secret_flags]
            + [
                name
                for name, value in (
                    ("key", settings.key),
                    ("passphrase", settings.passphrase),
                    ("compiled key", settings.compiled_key),
                    ("adapters' key", settings.adapters_key),
                    ("vault token", settings.vault.token),
                    ("vault secret id", settings.vault.secret_id),
                )
                if value
            ]
            + (["s3 credentials"] if settings.s3.secret_access_key else [])
            + (["azure credentials"] if _has_azure_secret(settings) else [])
        ),
        "environment": {
            name: _shown(name, value, settings.pass_env) for name, value in plan.environment
        },
    }


def _shown_key(settings: Settings) -> str:
    """Where the model's key will come from."""
    given = settings.key or settings.passphrase
    if given is not None:
        return f"from {given.origin}"
    if settings.key_uri is None:
        return "none, unless the manifest has one wrapped for a service that is set up here"
    reference = Reference.parse(settings.key_uri, "TENSORSERVE_KEY_URI")
    return f"the manifest's, unwrapped by {shown(reference, services_for(settings))}"


def _shown_trust(settings: Settings) -> dict[str, object]:
    """Who has to have signed the bundle."""
    trust = trust_for(settings)
    return {} if trust is None else {"signature": f"required, of {trust.shown}"}


def _has_azure_secret(settings: Settings) -> bool:
    azure = settings.azure
    secrets = (azure.connection_string, azure.account_key, azure.sas_token, azure.client_secret)
    return any(secret is not None for secret in secrets)


def _shown_draft(draft: Draft | None) -> dict[str, object]:
    if draft is None:
        return {}
    shown = redact_text(draft.model or "in the served model")
    return {"draft": "packed with the bundle" if draft.packed else shown}


def _shown_adapters(plan: LaunchPlan, settings: Settings) -> dict[str, object]:
    """Where adapters come from while serving, what opens them, and which flags that has added."""
    if settings.adapters_uri is None:
        return {}
    key = settings.adapters_key
    added = " ".join(plan.chosen_for_adapters) or "none"
    return {
        "adapters": {
            "from": redact_uri(settings.adapters_uri),
            "names": ", ".join(settings.adapters_allow) or "all",
            "key": "as the model's" if key is None else f"from {key.origin}",
            "flags added": added,
        }
    }


def _shown(name: str, value: str, passed: tuple[str, ...]) -> str:
    """A variable's value; redacted where its name or TENSORSERVE_PASS_ENV tells of a secret."""
    parts = name.upper().split("_")
    if name in passed or (parts[-1] != "FILE" and _SECRET_WORDS.intersection(parts)):
        return REDACTED
    if name.upper().endswith("_PROXY") and "@" in value:  # a proxy needs no scheme
        return f"{REDACTED}@{value.rpartition('@')[2]}"
    return redact_text(redact_uri(value)) if "://" in value else value


def _engine_environment(settings: Settings) -> tuple[tuple[str, str], ...]:
    """The allow-listed environment, with what a served bundle never needs switched off."""
    # Everything is in the bundle: nothing is fetched from a hub. No usage statistics are sent.
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if settings.adapters_uri is not None:
        defaults[adapter_flags.UPDATING] = "1"
    given = dict(settings.environment)
    root = cache_root(given)
    if root is not None:
        defaults |= cache_variables(root)
    return tuple(sorted((defaults | given).items()))
