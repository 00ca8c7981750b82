"""How does `tensorserve serve` become `vllm serve`? Checks, small files, hand-over, exec.

vLLM's program is exec'd at once and imports beside the checks (launch/import_first.py), or, with
TENSORSERVE_IMPORT_ONCE=off, after them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tensorserve.bounded_json import read_json
from tensorserve.config.draft_model import with_draft
from tensorserve.config.launch_plan import LaunchPlan, wants_adapters, with_adapters
from tensorserve.config.variables import HANDOFF_VARIABLE
from tensorserve.errors import ConfigurationError, TensorserveError, of_file
from tensorserve.launch import handoff
from tensorserve.launch.compiled_cache import bring_compiled
from tensorserve.launch.completeness import check_complete
from tensorserve.launch.context import Start, current_start, publish_start
from tensorserve.launch.cpu_environment import cpu_environment
from tensorserve.launch.import_first import Program, import_beside
from tensorserve.launch.lora_adapters import hold_adapters
from tensorserve.launch.prefetch_process import start_prefetch
from tensorserve.launch.preflight import prepare_state_dir, run_checks
from tensorserve.launch.preflight.vllm_build import engine_is_cpu
from tensorserve.launch.served_directory import make_model_dir
from tensorserve.launch.trtllm_kernels import without_downloads
from tensorserve.launch.vllm_model_cache import bring_model_infos
from tensorserve.secret import Secret
from tensorserve.telemetry import Edge, EventLog, Phase, events_path
from tensorserve.telemetry.schema import (
    CheckPassed,
    EngineProcessStarted,
    PhaseChanged,
    SignatureKnown,
    StartFailed,
    VerificationKnown,
)

# In a folder of its own: Python adds a program's folder to its import path.
PROGRAM = Path(__file__).parents[1] / "engine" / "program" / "vllm"


def serve(environ: Mapping[str, str], arguments: tuple[str, ...]) -> NoReturn:
    """Check, fetch the small files, and exec `vllm serve`. Raises TensorserveError before that.

    Where vLLM imports beside the checks, the error is raised in the process that checks.
    """
    start = current_start(environ, arguments)
    settings = start.settings
    for warning in settings.warnings:  # none under `up`, which has printed them
        _warn(warning)
    prepare_state_dir(settings.state_dir)
    log_path = events_path(settings.state_dir)
    log = EventLog(log_path)
    try:
        if settings.import_once == "off":
            program = _prepare(start, log)
            log.emit(EngineProcessStarted(None, "spawn", "TENSORSERVE_IMPORT_ONCE=off"))
            _become(program)
        start = _for_forks(start)
        known = Program((str(PROGRAM), *start.plan.argv[1:]), dict(start.plan.environment))
        import_beside(lambda: _prepare(start, log), known, log_path)
    except TensorserveError as error:
        log.emit(StartFailed.by(error))
        raise
    except OSError as error:
        if (said := of_file(error)) is not None:
            log.emit(StartFailed.by(said))
        raise


def _prepare(start: Start, log: EventLog) -> Program:
    """Run the checks, make vLLM's directory and hand the start over. Gives what vLLM shall run."""
    settings, plan = start.settings, start.plan
    log.emit(PhaseChanged(Phase.PREFLIGHT, Edge.BEGIN))
    checked = run_checks(
        settings, plan, lambda passed: log.emit(CheckPassed(passed.name, passed.found))
    )
    settings, weights = checked.settings, checked.weights
    log.emit(VerificationKnown(weights.verification))
    if settings.signed_by is not None:
        log.emit(SignatureKnown(settings.signed_by.kind, settings.signed_by.fingerprint))
    _warn(weights.warning)
    log.emit(PhaseChanged(Phase.PREFLIGHT, Edge.END))
    # The same for all processes of the start, however much memory is left later.
    settings = replace(settings, host_memory_limit=checked.host_memory_limit)
    log.emit(PhaseChanged(Phase.ARTIFACTS, Edge.BEGIN))
    files = make_model_dir(plan, settings, weights.manifest, weights.index)
    check_complete(files, lambda name: (plan.model_dir / name).read_bytes(), plan)
    if wants_adapters(plan):
        held = hold_adapters(plan.bundle_uri, plan.model_dir, settings, weights.manifest)
        plan = with_adapters(plan, [(a.name, a.directory, a.rank) for a in held])
    if plan.chosen_for_adapters:
        _note(
            f"TENSORSERVE_ADAPTERS_URI adds {' '.join(plan.chosen_for_adapters)}; a variable "
            "TENSORSERVE_VLLM_<FLAG> takes the place of each."
        )
    if weights.draft is not None:
        plan = plan.with_arguments(with_draft(plan.arguments, weights.draft.directory))
    plan, replaced = without_downloads(plan, checked.gpus, _configuration(plan.model_dir))
    _warn(replaced)
    plan = bring_compiled(settings, plan, weights.manifest, checked.gpus, log.emit, _warn)
    bring_model_infos(plan.model_dir, dict(plan.environment))
    log.emit(PhaseChanged(Phase.ARTIFACTS, Edge.END))
    prefetched = start_prefetch(settings, plan, weights.shards, log)
    reference = publish_start(
        Start(settings, plan, weights.shards, start.processors, prefetched, weights.draft)
    )
    log.emit(PhaseChanged(Phase.IMPORT, Edge.BEGIN))
    return _planned(plan, settings.state_dir, reference)


def _note(text: str) -> None:
    print(f"tensorserve: {text}", file=sys.stderr, flush=True)


def _warn(text: str | None) -> None:
    if text is not None:
        print(f"tensorserve: warning: {text}", file=sys.stderr, flush=True)


def _configuration(model_dir: Path) -> dict[str, object]:
    """The model's config.json; empty where it cannot be read, which vLLM reports itself."""
    with suppress(OSError, ValueError):
        config = read_json((model_dir / "config.json").read_bytes())
        return config if isinstance(config, dict) else {}
    return {}


def _for_forks(start: Start) -> Start:
    """The start with the variables that processes need which are forked, not spawned."""
    environment = dict(start.plan.environment)
    # That there is no vLLM is for the checks to report.
    with suppress(ConfigurationError):
        if engine_is_cpu():
            environment |= cpu_environment(environment)
    return replace(start, plan=replace(start.plan, environment=tuple(sorted(environment.items()))))


def _planned(plan: LaunchPlan, state_dir: Path, reference: str) -> Program:
    """The planned `vllm serve`, with the start that was left at `reference`."""
    arguments = [str(PROGRAM), *plan.argv[1:]]
    if plan.secret_flags:
        # As two words: vLLM ignores `--config=FILE`.
        arguments += ["--config", str(_secret_config(plan.secret_flags, state_dir))]
    return Program(tuple(arguments), dict(plan.environment) | {HANDOFF_VARIABLE: reference})


def _become(program: Program) -> NoReturn:
    """Replace this process with vLLM's program."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *program.arguments], program.environment)


def _secret_config(flags: tuple[tuple[str, Secret], ...], state_dir: Path) -> Path:
    """A YAML file for vLLM's `--config`: a link to a memfd, not a file on a disk."""
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
