"""A bundle as the engine loads it: its weights are checked, then loaded as the checks say."""

from __future__ import annotations

import time

from bench.contestants import Job, Loaded


def prepare(_job: Job) -> None:
    """Import everything that a load needs."""


def load(job: Job) -> Loaded:
    """All tensors of the bundle at `job.uri`. Option `verify`: as TENSORSERVE_VERIFY."""
    from tensorserve.bundle.tensors_file import open_tensors
    from tensorserve.config.access import access_for, key_for
    from tensorserve.config.launch_plan import make_plan
    from tensorserve.config.settings import Settings
    from tensorserve.engine.checked_load import checked_as
    from tensorserve.launch.preflight import check_weights
    from tensorserve.loading import LoadOptions, LoadProgress, TensorStream

    began = time.perf_counter()
    environment = {"TENSORSERVE_MODEL_URI": job.uri, "TENSORSERVE_VERIFY": job.options["verify"]}
    settings = Settings.from_environment(environment | {"TENSORSERVE_KEY_FILE": str(job.key_file)})
    weights = check_weights(settings, make_plan(settings))
    if weights.verification != job.options["mode"]:
        raise RuntimeError(f"{weights.verification} vouches here, not {job.options['mode']}")
    checked = time.perf_counter()
    (shard,) = weights.shards
    opened = open_tensors(shard.uri, access_for(settings), key_for(settings), version=shard.version)
    records = opened.index.tensors
    options = checked_as(LoadOptions(), shard, opened.index, records, opened.source.name)
    try:
        with TensorStream(
            opened.source,
            records,
            encrypted=opened.index.encrypted,
            key=opened.key,
            options=options,
            progress=LoadProgress(),
        ) as stream:
            tensors = {record.name: tensor for record, tensor in stream}
    finally:
        opened.source.close()
    parts = {"checks": checked - began, "load": time.perf_counter() - checked}
    return Loaded(tensors, parts=parts)
