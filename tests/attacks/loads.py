"""A load of a bundle's weights as the loader in vLLM does it, after the same checks."""

from __future__ import annotations

import torch

from tensorserve.checked_load import checked_as
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream
from tensorserve.opening import access_for, key_for, open_tensors
from tensorserve.plan import make_plan
from tensorserve.preflight import Weights, check_weights
from tensorserve.settings import Settings


def load(environ: dict[str, str], rank: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of the file of `rank`. Raises what ends a start."""
    settings = Settings.from_environment(environ)
    weights = Weights()
    for _ in check_weights(settings, make_plan(settings), weights, None):
        pass
    shard, key = weights.shards[rank], key_for(settings)
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
