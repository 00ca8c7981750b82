"""What will be started: Settings → LaunchPlan. Pure: no file, socket or process is touched here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from tensorserve import vllm_flags
from tensorserve.api_key import MIDDLEWARE
from tensorserve.drafts import draft_of
from tensorserve.errors import ConfigurationError
from tensorserve.fingerprint import MOST_RANKS
from tensorserve.manifest import SHARDS, SINGLE
from tensorserve.secret import REDACTED, Secret, redact_text, redact_uri
from tensorserve.settings import Settings

# What vLLM's own page writes for tensor-parallel shards: "model-rank-%03d.tensors".
SHARD_PATTERN = re.compile(r"%0\dd")
# Few enough digits for int(), which refuses more than 4,300 in its own words.
_WHOLE = re.compile(r"[0-9]{1,18}")
# What vLLM's --max-lora-rank may be (vllm/config/lora.py, 0.32.0), and is by default.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_LORA_RANK = 16
# What is served where its place has no name ("/").
_NAMELESS = "model"
# vLLM's other names for dtypes (vllm/config/model.py, 0.32.0); "auto" is decided by vLLM.
_DTYPES = {"half": "float16", "float": "float32"}
# As parts of a variable's name.
_SECRET_WORDS = frozenset({"KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS"})


@dataclass(frozen=True)
class LaunchPlan:
    """The start, as plain data."""

    argv: tuple[str, ...]
    """`vllm serve …`, word by word; no secret is in it."""
    environment: tuple[tuple[str, str], ...]
    """Everything that the engine inherits."""
    secret_flags: tuple[tuple[str, Secret], ...]
    """Flags that vLLM reads from memory instead of its arguments (its API key)."""
    bundle_uri: str
    """Where configuration and tokenizer are."""
    tensors: tuple[str, ...]
    """Candidates for the weights, best first; "%03d" stands for a rank."""
    tensor_parallel_size: int
    model_dir: Path
    """Where configuration and tokenizer are put for vLLM."""
    served_name: str
    health_url: str
    host: str
    port: int
    engine: tuple[tuple[str, object], ...] = ()
    """What the flags say of the engine's fingerprint (fingerprint.py) beside the size above."""

    def shards(self, template: str) -> tuple[str, ...]:
        """The files that `template` means: one a rank, or the one file of all ranks."""
        if not SHARD_PATTERN.search(template):
            return (template,)
        return tuple(shard_name(template, rank) for rank in range(self.tensor_parallel_size))


def shard_name(template: str, rank: int) -> str:
    """The file of `rank`; a template without a pattern is the name of all ranks' file.

    Not by the % operator: a name may have other percent signs in it.
    """
    return SHARD_PATTERN.sub(lambda found: found[0] % rank, template)


def make_plan(settings: Settings, arguments: tuple[str, ...] = ()) -> LaunchPlan:
    """The plan for `settings`, with `arguments` (what stood after `--`) added to `vllm serve`.

    Arguments win over variables. Raises ConfigurationError for those that we must own.
    """
    given = _GivenArguments(arguments)
    host = given.value("host") or settings.host
    port = given.port(settings.port)
    model_dir = settings.state_dir / "model"
    bundle_uri, tensors = split_model_uri(settings.model_uri)
    served_name = settings.model_name or served_name_of(settings.model_uri)
    argv = ["vllm", "serve", str(model_dir), "--load-format=tensorizer"]
    for name, value in (("served-model-name", served_name), ("host", host), ("port", str(port))):
        if name not in given.names:
            argv.append(f"--{name}={value}")
    flags = dict(settings.flags)
    for name, words in settings.flags:
        if name not in given.names:
            argv += words
    argv += given.plain
    draft_of(tuple(argv))  # raises for what vLLM could not read
    secret_flags = dict(settings.secret_flags) | dict(given.secrets)
    environment = _engine_environment(settings)
    if "api-key" in secret_flags:
        _refuse_unguarded_doors({*flags, *given.names}, dict(environment))
        # The last one stands before all others.
        argv.append(f"--middleware={MIDDLEWARE}")

    def wish(name: str) -> str | None:
        words = flags.get(name, ())
        return given.value(name) or next((w.partition("=")[2] for w in words), None)

    secure = "ssl-certfile" in flags or "ssl-certfile" in given.names
    return LaunchPlan(
        argv=tuple(argv),
        environment=environment,
        secret_flags=tuple(secret_flags.items()),
        bundle_uri=bundle_uri,
        tensors=tensors,
        tensor_parallel_size=_positive(wish("tensor-parallel-size"), "--tensor-parallel-size"),
        model_dir=model_dir,
        served_name=given.value("served-model-name") or served_name,
        health_url=f"{'https' if secure else 'http'}://{_reachable(host)}:{port}/health",
        host=host,
        port=port,
        engine=_engine(wish, argv),
    )


def _refuse_unguarded_doors(flags: set[str], environment: Mapping[str, str]) -> None:
    """With an API key: what serves beside the HTTP server that the key guards."""
    for name in ("grpc", "grpc-port"):
        if name in flags:
            raise ConfigurationError(
                f"--{name} serves without the API key that is set.",
                hint=f"Leave --{name} away, or unset the key and guard the port otherwise.",
            )
    if environment.get("VLLM_USE_RUST_FRONTEND", "0") not in {"", "0", "false", "False"}:
        raise ConfigurationError(
            "VLLM_USE_RUST_FRONTEND takes no middleware: it would leave most of its routes open, "
            "and an API key is set.",
            hint="Unset VLLM_USE_RUST_FRONTEND, or unset the key and guard the port otherwise.",
        )


def _engine(wish: Callable[[str], str | None], argv: list[str]) -> tuple[tuple[str, object], ...]:
    fields: dict[str, object] = {
        "pipeline_parallel_size": _positive(
            wish("pipeline-parallel-size"), "--pipeline-parallel-size"
        ),
        "expert_parallel": "-ep" in argv or "--enable-expert-parallel" in map(_flag_of, argv),
    }
    dtype = wish("dtype")
    if dtype not in {None, "auto"}:
        fields["dtype"] = _DTYPES.get(str(dtype), dtype)
    return tuple(fields.items())


def wants_adapters(plan: LaunchPlan) -> bool:
    """Whether a bundle's adapters are to be served: unless the user said --no-enable-lora."""
    return "--no-enable-lora" not in map(_flag_of, plan.argv)


def trusts_code(plan: LaunchPlan) -> bool:
    """Whether vLLM is told to run a bundle's code."""
    return "--trust-remote-code" in map(_flag_of, plan.argv)


def with_adapters(plan: LaunchPlan, adapters: Sequence[tuple[str, Path, int]]) -> LaunchPlan:
    """The plan that serves `adapters` (name, directory, rank) too. What the user gave wins."""
    if not adapters:
        return plan
    argv = list(plan.argv)
    given = {_flag_of(word) for word in argv}
    if "--enable-lora" not in given:
        argv.append("--enable-lora")
    rank = max(rank for _, _, rank in adapters)
    if "--max-lora-rank" not in given and rank > _DEFAULT_LORA_RANK:
        fitting = [allowed for allowed in _LORA_RANKS if allowed >= rank]
        if not fitting:
            raise ConfigurationError(
                f"An adapter is of rank {rank}; vLLM serves up to {_LORA_RANKS[-1]}."
            )
        argv.append(f"--max-lora-rank={fitting[0]}")
    modules = [
        json.dumps({"name": name, "path": str(path), "base_model_name": plan.served_name})
        for name, path, _ in adapters
    ]
    return replace(plan, argv=tuple(_with_modules(argv, modules)))


def _with_modules(argv: list[str], modules: list[str]) -> list[str]:
    """vLLM takes the last --lora-modules only: ours go to the user's own."""
    for number, word in enumerate(argv):
        if _flag_of(word) == "--lora-modules":
            _, equals, attached = word.partition("=")
            own = [attached] if equals else []
            return [*argv[:number], "--lora-modules", *modules, *own, *argv[number + 1 :]]
    return [*argv, "--lora-modules", *modules]


def _flag_of(word: str) -> str:
    return word.partition("=")[0].replace("_", "-") if word.startswith("--") else ""


def split_model_uri(uri: str) -> tuple[str, tuple[str, ...]]:
    """(directory of the bundle, candidate names of the weights in it, decoded).

    Raises ConfigurationError for a template that names the rank twice, or a name with an encoded
    slash, which no file has.
    """
    encoded = uri.startswith(("http://", "https://", "file://"))
    scheme, separator, rest = uri.partition("://") if "://" in uri else ("", "", uri)
    query = ""
    if scheme in {"http", "https"}:  # elsewhere "?" and "#" are characters of a name
        rest, _, _ = rest.partition("#")
        rest, mark, query = rest.partition("?")
        query = mark + query
    directory, slash, name = rest.rpartition("/")
    # "https://x.tensors" and "s3://x.tensors" are a host and a bucket.
    if not name.endswith(".tensors") or (separator and not slash):
        return uri, (SINGLE, SHARDS)
    if len(SHARD_PATTERN.findall(name)) > 1:
        raise ConfigurationError(
            f"{redact_uri(uri)}: the name has two places for a rank.",
            hint="For example model-rank-%03d.tensors.",
        )
    if encoded:
        # "%03d" stands for a rank: it is not an encoded character.
        pieces = [unquote(piece) for piece in SHARD_PATTERN.split(name)]
        name = "".join(
            part
            for pair in zip(pieces, [*SHARD_PATTERN.findall(name), ""], strict=True)
            for part in pair
        )
        if "/" in name:
            raise ConfigurationError(
                f"{redact_uri(uri)}: the file's name has an encoded slash (%2F).",
                hint="Give the URL of a directory, with the file's own name behind it.",
            )
    if not separator:
        directory = directory or ("/" if slash else ".")
    return f"{scheme}{separator}{directory}{query}", (name,)


def served_name_of(uri: str) -> str:
    """A name for clients: what follows `vllm/` in the URI (vLLM's layout), else the last part.

    s3://bucket/vllm/my-model/v1 → my-model/v1; /models/my-model/model.tensors → my-model. Where
    there is no path, the bucket's or host's name; never what stands before the host.
    """
    scheme, separator, rest = redact_uri(uri).partition("://")  # a password may hold a "/"
    place, path = "", uri
    if separator:
        if scheme != "file":
            place, _, rest = rest.partition("?")[0].partition("/")
        path = unquote(rest) if unquote(rest).isprintable() else rest
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if parts and parts[-1].endswith(".tensors"):
        stem = parts.pop().removesuffix(".tensors")
        if not parts:
            return stem or _NAMELESS
    if "vllm" in parts[:-1]:
        return "/".join(parts[parts.index("vllm") + 1 :])
    if parts:
        return parts[-1]
    return re.sub(r":\d*$", "", place.rpartition("@")[2]) or _NAMELESS


def describe(plan: LaunchPlan, settings: Settings) -> dict[str, object]:
    """The plan for a person or a program to read, secrets redacted."""
    bundle = redact_uri(plan.bundle_uri)
    return {
        "settings": dict(settings.shown()),
        "bundle": bundle,
        # As the URI is shown: what looks like a password in it looks like one in a name.
        "weights": [
            redact_uri(f"{plan.bundle_uri.partition('?')[0]}/{template}").rpartition("/")[2]
            for template in plan.tensors
        ],
        "model_directory": str(plan.model_dir),
        "command": [redact_text(word) for word in plan.argv],
        "secrets_in_memory": sorted(
            [f"--{name}" for name, _ in plan.secret_flags]
            + [
                name
                for name, value in (("key", settings.key), ("passphrase", settings.passphrase))
                if value
            ]
            + (["s3 credentials"] if settings.s3.secret_access_key else [])
        ),
        "environment": {
            name: _shown(name, value, settings.pass_env) for name, value in plan.environment
        },
    }


def _shown(name: str, value: str, passed: tuple[str, ...]) -> str:
    """A variable's value, unless it is, or by its name may be, a secret.

    What the user passes on is mostly one: what needs none is let through without asking.
    """
    parts = name.upper().split("_")
    if name in passed or (parts[-1] != "FILE" and _SECRET_WORDS.intersection(parts)):
        return REDACTED
    return redact_text(redact_uri(value)) if "://" in value else value


def _reachable(host: str) -> str:
    """An address at which this machine reaches a server bound to `host`."""
    if host in {"", "0.0.0.0", "*"}:
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def _positive(text: str | None, name: str) -> int:
    if text is None:
        return 1
    if _WHOLE.fullmatch(text) and 0 < int(text) <= MOST_RANKS:
        return int(text)
    raise ConfigurationError(f"{name} {text[:40]!r} is not a whole number from 1 to {MOST_RANKS}.")


def _engine_environment(settings: Settings) -> tuple[tuple[str, str], ...]:
    """The allow-listed environment, with what a served bundle never needs switched off."""
    # Nothing is looked up at a hub: everything is in the bundle. No usage statistics are sent.
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return tuple(sorted((defaults | dict(settings.environment)).items()))


class _GivenArguments:
    """The words after `--`: which flags they name, and which of them are secret."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self.plain: list[str] = []
        self.secrets: list[tuple[str, Secret]] = []
        self._values: dict[str, str | None] = {}
        shorts = {s: f.name for f in vllm_flags.known_flags().values() for s in f.short}
        words = list(arguments)
        while words:
            word = words.pop(0)
            if not word.startswith("-") or _is_number(word):
                raise ConfigurationError(
                    f"Unexpected argument {word!r}: the model comes from TENSORSERVE_MODEL_URI.",
                    hint="After `--`, only flags of `vllm serve` may follow.",
                )
            text, equals, attached = word.partition("=")
            name = shorts.get(text) or text.removeprefix("--").replace("_", "-")
            base = name.partition(".")[0]
            flag = vllm_flags.flag_for(base)
            if flag is None and base.startswith("no-"):
                flag = vllm_flags.flag_for(base.removeprefix("no-"))
            if flag is None:
                near = vllm_flags.nearest_flag(base)
                raise ConfigurationError(
                    f"`vllm serve` {vllm_flags.VLLM_VERSION} has no flag {text}.",
                    hint=f"Did you mean --{near}?" if near else "See `vllm serve --help=all`.",
                )
            if flag.name in vllm_flags.OWNED:
                raise ConfigurationError(
                    f"{text} cannot be given.", hint=f"{vllm_flags.OWNED[flag.name]}."
                )
            values: list[str] = [attached] if equals else []
            if not equals and flag.kind in {"value", "values"}:
                while words and (not words[0].startswith("-") or _is_number(words[0])):
                    values.append(words.pop(0))
                    if flag.kind == "value":
                        break
            if flag.name in vllm_flags.SECRET:
                self.secrets += [(flag.name, Secret(v, origin=f"{text} argument")) for v in values]
            else:
                self._values[flag.name] = values[0] if values else None
                self.plain += [word, *([] if equals else values)]

    @property
    def names(self) -> set[str]:
        return set(self._values)

    def value(self, name: str) -> str | None:
        return self._values.get(name)

    def port(self, default: int) -> int:
        text = self.value("port")
        if text is None:
            return default
        if _WHOLE.fullmatch(text) and 0 < int(text) < 65536:
            return int(text)
        raise ConfigurationError(f"--port {text[:40]!r} is not a port.", hint="Use 1 to 65535.")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
