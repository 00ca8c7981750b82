"""The engine program: checks, small files, hand-over of secrets, then `exec vllm serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tensorserve import handoff
from tensorserve.adapters import hold_adapters
from tensorserve.artifacts import fetch_artifacts
from tensorserve.errors import TensorserveError
from tensorserve.model_infos import bring_model_infos
from tensorserve.opening import access_for, has_key
from tensorserve.plan import LaunchPlan, make_plan, trusts_code, wants_adapters, with_adapters
from tensorserve.prefetching import start_prefetch
from tensorserve.preflight import Weights, prepare_state_dir, run_checks
from tensorserve.secret import Secret
from tensorserve.settings import HANDOFF_VARIABLE
from tensorserve.start import current_start, publish_start
from tensorserve.telemetry import EventLog, events_path

# In a folder of its own: Python can import what stands beside a program.
PROGRAM = Path(__file__).with_name("program") / "vllm"


def serve(environ: Mapping[str, str], arguments: tuple[str, ...]) -> NoReturn:
    """Check, fetch the small files, and become `vllm serve`. Raises rather than start it wrong."""
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
        log.emit("verification", mode=weights.verification)
        if weights.warning is not None:
            print(f"tensorserve: warning: {weights.warning}", file=sys.stderr, flush=True)
        log.emit("phase", phase="preflight", state="end")
        # The same for all processes of the start, whatever is left when they look.
        settings = replace(settings, host_memory_limit=weights.host_memory_limit)
        log.emit("phase", phase="artifacts", state="begin")
        fetch_artifacts(
            plan.bundle_uri,
            access_for(settings),
            plan.model_dir,
            weights.manifest,
            remote_code=trusts_code(plan),
            sealed=has_key(settings),
        )
        if wants_adapters(plan):
            held = hold_adapters(plan.bundle_uri, plan.model_dir, settings, weights.manifest)
            plan = with_adapters(plan, [(a.name, a.directory, a.rank) for a in held])
        bring_model_infos(plan.model_dir, dict(plan.environment))
        log.emit("phase", phase="artifacts", state="end")
        prefetched = start_prefetch(settings, plan, weights.shards, log)
        reference = publish_start(environ, settings, start.arguments, weights.shards, prefetched)
        log.emit("phase", phase="import", state="begin")
        become_vllm(plan, settings.state_dir, reference)
    except TensorserveError as error:
        log.emit("failure", reason=error.reason, exit_code=error.exit_code, message=error.message)
        raise


def become_vllm(plan: LaunchPlan, state_dir: Path, reference: str) -> NoReturn:
    """Replace this process with the planned `vllm serve`."""
    argv = [sys.executable, str(PROGRAM), *plan.argv[1:]]
    if plan.secret_flags:
        # Two words: vLLM reads no file for `--config=FILE`, and says nothing.
        argv += ["--config", str(_secret_config(plan.secret_flags, state_dir))]
    environment = dict(plan.environment) | {HANDOFF_VARIABLE: reference}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, argv, environment)


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
