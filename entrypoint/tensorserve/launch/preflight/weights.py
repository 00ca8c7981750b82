"""Are the bundle's weights there and whole, and does the key open them?"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from tensorserve import sources
from tensorserve.bundle.adapters import adapters_of
from tensorserve.bundle.engine_fingerprint import Fingerprint, check_fingerprint
from tensorserve.bundle.layout import check_layout, has_head, is_vllm_layout
from tensorserve.bundle.location import SHARD_PATTERN, shard_name
from tensorserve.bundle.manifest import MANIFEST, Manifest, check_index
from tensorserve.bundle.not_a_bundle import explain_missing, explain_refused
from tensorserve.bundle.tensors_file import OpenTensors, open_manifest, open_tensors
from tensorserve.bundle.trust import DIGESTS, WARNINGS, verification_of
from tensorserve.config.access import access_for, key_for
from tensorserve.config.launch_plan import LaunchPlan, wants_adapters
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError
from tensorserve.format import FileKey, read_header, require_digest
from tensorserve.launch.context import Shard
from tensorserve.launch.preflight.results import Passed, Report, Weights, unreported
from tensorserve.launch.preflight.vllm_build import engine_is_cpu, vllm_release
from tensorserve.launch.served_directory import check_model_dir
from tensorserve.sources import Access, ForbiddenError, NotFoundError
from tensorserve.telemetry import Check


def check_source(
    settings: Settings,
    plan: LaunchPlan,
    report: Report = unreported,
) -> Weights:
    """Every shard is there, whole, a .tensors file, and opened by the key; so is what vLLM reads
    beside it."""
    weights = check_weights(settings, plan, report)
    # Before vLLM starts, and in `check`; the directory is made by the same rules.
    found = check_model_dir(plan, settings, weights.manifest, weights.shards[0].uri)
    report(Passed(Check.CONFIGURATION, f"{found}, {_bound(weights.manifest)}"))
    if (adapters := adapters_of(weights.manifest)) and wants_adapters(plan):
        if plan.served_name in adapters:
            raise ConfigurationError(
                f"The bundle has an adapter {plan.served_name!r}, and the model is served under "
                "this name.",
                hint="Set TENSORSERVE_MODEL_NAME to another name.",
            )
        report(Passed(Check.ADAPTERS, ", ".join(adapters)))
    return weights


def check_weights(
    settings: Settings,
    plan: LaunchPlan,
    report: Report = unreported,
) -> Weights:
    """Every shard is there, whole, a .tensors file, and opened by the key."""
    access = access_for(settings)
    key = key_for(settings)
    firsts = [plan.shards(template)[0] for template in plan.tensors]
    try:
        manifest = open_manifest(
            plan.bundle_uri,
            access,
            key,
            firsts,
            pin=settings.manifest_sha256,
            wish=settings.verify,
        )
    except ForbiddenError as error:
        beside = sources.join(plan.bundle_uri, firsts[0])
        raise explain_refused(plan.bundle_uri, access, beside, error) from error
    listed = manifest.tensors_files if manifest else {}
    # Another file may stand beside a bundle's own, and be named in the URI.
    own = any(name in listed for template in plan.tensors for name in plan.shards(template))
    fingerprint = manifest.fingerprint if manifest and own else None
    if fingerprint is not None:
        check_engine(fingerprint, plan)
    template, first = _first_shard(plan, access, key, manifest)
    opened = [first]
    try:
        for name in plan.shards(template)[1:]:
            opened.append(open_tensors(sources.join(plan.bundle_uri, name), access, key))
        ranks, sharded = plan.tensor_parallel_size, bool(SHARD_PATTERN.search(template))
        for one in opened:
            check_layout(
                one.index, one.source.name, ranks, sharded=sharded, fingerprinted=bool(fingerprint)
            )
        names = plan.shards(template)
        for name, one in zip(names, opened, strict=True):
            # A manifest that is believed names every file there is.
            if manifest and (name in listed or manifest.authenticated_by or len(plan.tensors) > 1):
                check_index(manifest, name, one.index)
        weights = Weights(
            shards=tuple(
                shard_of(settings, plan, name, one, manifest, fingerprint)
                for name, one in zip(names, opened, strict=True)
            ),
            data_bytes=sum(o.index.data_bytes for o in opened),
            largest_bytes=max((r.length for o in opened for r in o.index.tensors), default=0),
            sliced=fingerprint is None and not is_vllm_layout(first.index),
            manifest=manifest,
            index=first.index,
        )
        if first.index.encrypted:
            weights = replace(weights, warning=WARNINGS.get(weights.verification))
        tensors = sum(len(o.index.tensors) for o in opened)
        size = f"{tensors} tensors, {weights.data_bytes / 1e9:.3f} GB"
        shards = f" in {len(opened)} shards" if len(opened) > 1 else ""
        library = f", read by {first.source.library}" if first.source.library else ""
        report(Passed(Check.WEIGHTS, f"{first.source.name}: {size}{shards}{library}"))
        if fingerprint is not None:
            report(Passed(Check.LAYOUT, f"vLLM's own, for {fingerprint}"))
        secured = "encrypted, the key opens it" if first.index.encrypted else "not encrypted"
        report(Passed(Check.ENCRYPTION, secured))
        report(Passed(Check.VERIFICATION, _verified(weights)))
        return weights
    finally:
        for one in opened:
            one.source.close()


def shard_of(
    settings: Settings,
    plan: LaunchPlan,
    name: str,
    opened: OpenTensors,
    manifest: Manifest | None,
    fingerprint: Fingerprint | None,
) -> Shard:
    """What the loader is told of the file `name`.

    Raises CorruptError where nothing could authenticate it.
    """
    index, source = opened.index, opened.source
    entry = manifest.tensors_files.get(name) if manifest else None
    rule = verification_of(
        settings.verify, manifest, name, encrypted=index.encrypted, pinned=source.pinned
    )
    if index.encrypted and rule.mode == DIGESTS and index.tensors:
        # A missing digest should fail before vLLM starts: one tensor is looked at here, the loader
        # checks all.
        smallest = min(index.tensors, key=lambda record: record.length)
        require_digest(read_header(source, smallest, index))
    digests = entry.digests if entry and rule.digests else None
    return Shard(
        sources.join(plan.bundle_uri, name),
        source.version,
        source.size,
        headers_sha256=entry.headers_sha256 if entry else None,
        fingerprint=fingerprint.to_json() if fingerprint else None,
        index_sha256=index.digest,
        verification=rule.mode,
        check_digests=rule.digests,
        digests=b"".join(digests).hex() if digests else None,
        has_head=has_head(index),
    )


def _verified(weights: Weights) -> str:
    return {
        "manifest": f"{MANIFEST} authenticates every byte",
        "digests": "each tensor's own digest, no authenticated manifest",
        "tags": "the chunks' tags alone",
        "none": "nothing authenticates them",
    }[weights.verification]


def _bound(manifest: Manifest | None) -> str:
    if manifest is None:
        return "no manifest"
    return (
        "bound by the manifest"
        if manifest.authenticated_by
        else "in a manifest that is not authenticated"
    )


def check_engine(fingerprint: Fingerprint, plan: LaunchPlan) -> None:
    """As far as it is known without vLLM, the engine is the one whose parameters were packed."""
    here = dict(plan.engine) | {
        "vllm": vllm_release(),
        "device": "cpu" if engine_is_cpu() else "cuda",
        "tensor_parallel_size": plan.tensor_parallel_size,
    }
    check_fingerprint(fingerprint, here)


def _first_shard(
    plan: LaunchPlan,
    access: Access,
    key: FileKey | None,
    manifest: Manifest | None,
) -> tuple[str, OpenTensors]:
    """The template among the plan's candidates whose first file exists, and that file.

    If there is a manifest, its list of files decides. An authenticated one must win over a server
    that hides a file; any other is still the best list there is.
    """
    stated = manifest.tensors_files if manifest else {}
    named = [template for template in plan.tensors if plan.shards(template)[0] in stated]
    for template in named[:1]:
        _check_count(template, plan, stated)
        uri = sources.join(plan.bundle_uri, plan.shards(template)[0])
        return template, open_tensors(uri, access, key)
    missing: NotFoundError | ForbiddenError | None = None
    for template in plan.tensors:
        uri = sources.join(plan.bundle_uri, plan.shards(template)[0])
        try:
            opened = open_tensors(uri, access, key)
        except (NotFoundError, ForbiddenError) as error:
            # One that may be there is more to the point than one that is not.
            if missing is None or isinstance(error, ForbiddenError) > isinstance(
                missing, ForbiddenError
            ):
                missing = error
            continue
        if not SHARD_PATTERN.search(template):
            return template, opened
        beyond = sources.join(plan.bundle_uri, shard_name(template, plan.tensor_parallel_size))
        try:
            sources.open_source(beyond, access).close()
        except (NotFoundError, ForbiddenError):
            return template, opened
        opened.source.close()
        raise _other_count(f"more shards than {plan.tensor_parallel_size}", "larger")
    assert missing is not None
    if isinstance(missing, ForbiddenError) or len(plan.tensors) == 1:
        raise missing
    raise explain_missing(plan.bundle_uri, access, missing, sealed=key is not None) from missing


def _check_count(template: str, plan: LaunchPlan, stated: Collection[str]) -> None:
    """Raises ConfigurationError unless `template` means as many files as the manifest names."""
    wanted = plan.shards(template)
    if not SHARD_PATTERN.search(template):
        return
    before, after = SHARD_PATTERN.split(template)
    pattern = re.compile(rf"{re.escape(before)}\d+{re.escape(after)}")
    there = {name for name in stated if pattern.fullmatch(name)}
    if there != set(wanted):
        size = "larger" if len(there) > len(wanted) else "smaller"
        raise _other_count(f"{len(there)} shards by its {MANIFEST}, not {len(wanted)}", size)


def _other_count(found: str, size: str) -> ConfigurationError:
    return ConfigurationError(
        f"The bundle has {found}: it was made for a {size} tensor-parallel size.",
        hint="Set TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE to the number of its shards.",
    )
