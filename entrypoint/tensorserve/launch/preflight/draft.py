"""Is the model that drafts in the bundle, and does the key open it?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tensorserve import sources
from tensorserve.bundle.draft import draft_file, draft_in
from tensorserve.bundle.layout import check_layout
from tensorserve.bundle.manifest import SINGLE, check_index
from tensorserve.bundle.tensors_file import open_tensors
from tensorserve.bundle.trust import WARNINGS
from tensorserve.config.access import access_for, key_for
from tensorserve.config.draft_model import Draft
from tensorserve.config.launch_plan import LaunchPlan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.launch.context import PackedDraft
from tensorserve.launch.preflight.results import Passed, Report, Weights, unreported
from tensorserve.launch.preflight.weights import shard_of
from tensorserve.telemetry import Check


def check_draft_layout(draft: Draft, weights: Weights) -> None:
    """A draft that is part of the model is in the bundle, where that holds a checkpoint."""
    if draft.model is None and any(shard.fingerprint for shard in weights.shards):
        raise ConfigurationError(
            f"The bundle is in vLLM's own layout, without what {draft.method!r} drafts with.",
            hint="Pack the checkpoint without --layout vllm: such a bundle holds all of it.",
        )


def check_packed_draft(
    settings: Settings,
    plan: LaunchPlan,
    model_dir: Path,
    weights: Weights,
    report: Report = unreported,
) -> Weights:
    """`weights` with the bundle's draft model, which is there, whole, and opened by the key.

    `weights` are those that `check_weights` gives, `model_dir` is where vLLM will find the bundle's
    small files. Raises ConfigurationError where it has none, CorruptError and the sources' errors.
    """
    manifest = weights.manifest
    name = draft_in(manifest)
    if manifest is None or name is None:
        raise ConfigurationError(
            "A draft model is asked for (--speculative-config) that is to be in the bundle, and "
            "none was packed with it.",
            hint="Pack the model with it: `tensorserve pack SRC DEST --draft DIR`. Or give the "
            'draft\'s own directory as "model" of --speculative-config.',
        )
    file, access, key = draft_file(name, SINGLE), access_for(settings), key_for(settings)
    there = {entry.name for entry in manifest.files}
    if there.isdisjoint(draft_file(name, config) for config in ("config.json", "params.json")):
        raise CorruptError(
            f"The bundle's draft model {name!r} has no config.json.", hint="Pack the bundle again."
        )
    uri = sources.join(plan.bundle_uri, file)
    opened = open_tensors(uri, access, key)
    try:
        index = opened.index
        check_index(manifest, file, index)
        check_layout(index, opened.source.name, plan.tensor_parallel_size, sharded=False)
        # A checkpoint, whichever layout the model is in.
        shard = shard_of(settings, plan, file, opened, manifest, None)
    finally:
        opened.source.close()
    size = f"{len(index.tensors)} tensors, {index.data_bytes / 1e9:.3f} GB"
    report(Passed(Check.DRAFT, f"{opened.source.name}: {size}, packed with the bundle"))
    largest = max((record.length for record in index.tensors), default=0)
    weights = replace(
        weights,
        draft=PackedDraft(str(model_dir / draft_file(name, "").rstrip("/")), shard),
        draft_bytes=index.data_bytes,
        largest_bytes=max(weights.largest_bytes, largest),
    )
    if index.encrypted:
        weights = replace(weights, warning=WARNINGS.get(weights.verification))
    return weights
