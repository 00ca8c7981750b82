"""What must hold before vLLM is started? Each check takes milliseconds and saves a minute.

Order: first what is local, then who signed, then the key, then the source. `tensorserve check`
shows the results, `tensorserve serve` runs the same checks before every start.
"""

from __future__ import annotations

from dataclasses import replace

from tensorserve.config.draft_model import check_draft
from tensorserve.config.launch_plan import LaunchPlan
from tensorserve.config.settings import Settings
from tensorserve.config.signature import with_signature
from tensorserve.config.unwrapping import with_key
from tensorserve.launch.preflight.adapters import check_adapters
from tensorserve.launch.preflight.devices import check_device, visible_gpus
from tensorserve.launch.preflight.disk import (
    SHARED_MEMORY_BYTES,
    STATE_BYTES,
    check_shared_memory,
    check_state_dir,
    prepare_state_dir,
)
from tensorserve.launch.preflight.draft import check_draft_layout, check_packed_draft
from tensorserve.launch.preflight.listening import check_port, check_socket
from tensorserve.launch.preflight.memory import check_host_memory, check_memory
from tensorserve.launch.preflight.results import Checked, Passed, Report, Weights, unreported
from tensorserve.launch.preflight.vllm_build import check_vllm
from tensorserve.launch.preflight.weights import check_source, check_weights
from tensorserve.telemetry import Check
from tensorserve.telemetry.probe import socket_of

__all__ = [
    "SHARED_MEMORY_BYTES",
    "STATE_BYTES",
    "Checked",
    "Passed",
    "Report",
    "Weights",
    "check_adapters",
    "check_device",
    "check_host_memory",
    "check_memory",
    "check_packed_draft",
    "check_port",
    "check_shared_memory",
    "check_source",
    "check_vllm",
    "check_weights",
    "prepare_state_dir",
    "run_checks",
    "visible_gpus",
]


def run_checks(settings: Settings, plan: LaunchPlan, report: Report = unreported) -> Checked:
    """Run every check in order; the first that fails raises its TensorserveError."""
    ranks, draft, environment = plan.options.parallel.ranks, plan.options.draft, plan.environment
    report(check_vllm())
    gpus = visible_gpus(dict(environment))
    report(check_device(gpus, ranks))
    draft_bytes = 0
    if draft is not None and not draft.packed:
        where, draft_bytes = check_draft(draft, settings.model_uri, dict(environment))
        report(Passed(Check.DRAFT, where))
    uds = socket_of(plan.health_url)
    report(check_port("API", plan.host, plan.port) if uds is None else check_socket(uds))
    report(check_shared_memory())
    report(check_state_dir(settings.state_dir))
    settings = with_signature(settings, plan.bundle_uri)
    if settings.signed_by is not None:
        report(Passed(Check.SIGNATURE, f"by {settings.signed_by}"))
    given, settings = settings, with_key(settings, plan.bundle_uri)
    if settings.key is not None and given.key is None:
        report(Passed(Check.KEY, f"unwrapped by {settings.key.origin}{_unasked(given)}"))
    weights = check_source(settings, plan, report)
    if draft is not None and draft.packed:
        weights = check_packed_draft(settings, plan, plan.model_dir, weights, report)
    elif draft is not None:
        check_draft_layout(draft, weights)
        weights = replace(weights, draft_bytes=draft_bytes)
    size = weights.data_bytes + weights.draft_bytes
    report(check_memory(size, ranks, gpus, whole=not plan.options.smaller_on_gpu))
    limit, passed = check_host_memory(settings, plan, weights)
    report(passed)
    return Checked(settings, weights, gpus, limit)


def _unasked(given: Settings) -> str:
    """Of a key that only the manifest asked for."""
    if given.key_uri is not None:
        return ""
    return ", which the manifest names; with TENSORSERVE_KEY_URI a plain bundle would be refused"
