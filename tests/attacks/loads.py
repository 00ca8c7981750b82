"""A load of a bundle's weights as the loader in vLLM does it, after the same checks."""

from __future__ import annotations

import torch

from tensorserve.bundle.tensors_file import open_tensors
from tensorserve.config.access import access_for, key_for
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.config.unwrapping import with_key
from tensorserve.engine.checked_load import checked_as
from tensorserve.launch.preflight import check_packed_draft, check_weights
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream


def load(environ: dict[str, str], rank: int = 0, *, draft: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of the file of `rank`, or of the bundle's draft. Raises what ends a start."""
    settings = Settings.from_environment(environ)
    plan = make_plan(settings)
    settings = with_key(settings, plan.bundle_uri)
    weights = check_weights(settings, plan)
    if draft:
        weights = check_packed_draft(settings, plan, plan.model_dir, weights)
    shard, key = weights.shards[rank], key_for(settings)
    if draft:
        assert weights.draft is not None
        shard = weights.draft.shard
    opened = open_tensors(shard.uri, access_for(settings), key, version=shard.version)
    records = opened.index.tensors
    try:
        with TensorStream(
            opened.source,
            records,
            encrypted=opened.index.encrypted,
            key=key,
            options=checked_as(LoadOptions(), shard, opened.index, records, opened.source.name),
            progress=LoadProgress(),
        ) as stream:
            return {record.name: tensor.clone() for record, tensor in stream}
    finally:
        opened.source.close()
