"""The engine program: checks, small files, hand-over of secrets, then `exec vllm serve`."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from tensorserve import handoff
from tensorserve.errors import ConfigurationError, TensorserveError
from tensorserve.plan import LaunchPlan, make_plan
from tensorserve.secret import Secret
from tensorserve.settings import HANDOFF_VARIABLE, Settings, handed_over
from tensorserve.telemetry import EventLog, events_path


@dataclass(frozen=True)
class Shard:
    """One file of weights, as the checks found it."""

    uri: str
    version: str | None
    """What pins the object; the loader refuses another one."""
    size: int


@dataclass(frozen=True)
class Start:
    """What a process of a start takes over from its parent."""

    settings: Settings
    arguments: tuple[str, ...]
    shards: tuple[Shard, ...]

    def shard(self, rank: int) -> Shard:
        """The file that `rank` reads: its own, or the one that all ranks share."""
        return self.shards[rank] if len(self.shards) > 1 else self.shards[0]


def publish_start(
    environ: Mapping[str, str],
    settings: Settings,
    arguments: tuple[str, ...],
    shards: tuple[Shard, ...] = (),
) -> str:
    """Leave a start for child processes; the reference goes into `HANDOFF_VARIABLE`."""
    environment, origins = handed_over(environ, settings)
    return handoff.publish_json(
        {
            "environment": environment,
            "origins": origins,
            "arguments": list(arguments),
            "shards": [asdict(shard) for shard in shards],
        }
    )


def receive_start(environ: Mapping[str, str]) -> Start:
    """The start that a parent left, by the reference in `environ`. Raises TensorserveError."""
    payload = handoff.receive_json(environ[HANDOFF_VARIABLE])
    return Start(
        settings=Settings.from_environment(payload["environment"], payload["origins"]),
        arguments=tuple(payload["arguments"]),
        shards=tuple(Shard(**shard) for shard in payload["shards"]),
    )


def current_start(
    environ: Mapping[str, str], arguments: tuple[str, ...]
) -> tuple[Start, Mapping[str, str]]:
    """The start that this process belongs to: handed over by `up`, else from `environ` itself."""
    if HANDOFF_VARIABLE in environ:
        start = receive_start(environ)
        payload = handoff.receive_json(environ[HANDOFF_VARIABLE])
        return start, payload["environment"]
    return Start(Settings.from_environment(environ), arguments, ()), environ


def serve(environ: Mapping[str, str], arguments: tuple[str, ...]) -> NoReturn:
    """Check, fetch the small files, and become `vllm serve`. Raises rather than start it wrong."""
    from tensorserve.artifacts import fetch_artifacts
    from tensorserve.opening import access_for
    from tensorserve.preflight import Weights, prepare_state_dir, run_checks

    no_core_dumps()
    start, environ = current_start(environ, arguments)
    settings = start.settings
    prepare_state_dir(settings.state_dir)
    log = EventLog(events_path(settings.state_dir))
    try:
        plan = make_plan(settings, start.arguments)
        log.emit("phase", phase="preflight", state="begin")
        weights = Weights()
        for passed in run_checks(settings, plan, weights):
            log.emit("check", name=passed.name, found=passed.found)
        log.emit("phase", phase="preflight", state="end")
        log.emit("phase", phase="artifacts", state="begin")
        fetch_artifacts(
            plan.bundle_uri,
            access_for(settings),
            plan.model_dir,
            weights.manifest,
            remote_code="--trust-remote-code" in plan.argv,
        )
        log.emit("phase", phase="artifacts", state="end")
        reference = publish_start(environ, settings, start.arguments, weights.shards)
        log.emit("phase", phase="import", state="begin")
        become_vllm(plan, settings.state_dir, reference)
    except TensorserveError as error:
        log.emit("failure", reason=error.reason, exit_code=error.exit_code, message=error.message)
        raise


def become_vllm(plan: LaunchPlan, state_dir: Path, reference: str) -> NoReturn:
    """Replace this process with the planned `vllm serve`."""
    program = Path(sys.executable).with_name("vllm")
    found = str(program) if program.exists() else shutil.which("vllm")
    if found is None:
        raise ConfigurationError("There is no `vllm` program beside this Python or on the PATH.")
    argv = list(plan.argv)
    if plan.secret_flags:
        # Two words: vLLM reads no file for `--config=FILE`, and says nothing.
        argv += ["--config", str(_secret_config(plan.secret_flags, state_dir))]
    environment = dict(plan.environment) | {HANDOFF_VARIABLE: reference}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(found, argv, environment)


def no_core_dumps() -> None:
    """A core file would hold the key and the weights in plain text."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _secret_config(flags: tuple[tuple[str, Secret], ...], state_dir: Path) -> Path:
    """A YAML file for vLLM's `--config` that is a link into our memory, not a file on a disk."""
    import json

    grouped: dict[str, list[str]] = {}
    for name, secret in flags:
        grouped.setdefault(name, []).append(secret.reveal_text())
    # JSON is YAML; a list for flags that take several values.
    content = {
        name: values if name == "api-key" else values[-1] for name, values in grouped.items()
    }
    link = state_dir / "secret-flags.yaml"
    link.unlink(missing_ok=True)
    link.symlink_to(handoff.publish(json.dumps(content).encode(), "vllm-flags"))
    return link
