"""What must hold before vLLM is started: each check takes milliseconds and saves a minute.

Order: first what is local, then the source, then the key. `tensorserve check` shows the results,
`tensorserve serve` runs the same checks before every start.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tensorserve import sources, vllm_flags
from tensorserve.artifacts import artifact_names
from tensorserve.drafts import Draft, check_draft, draft_of
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.fingerprint import Fingerprint, check_fingerprint
from tensorserve.format import FileKey, read_header, require_digest
from tensorserve.gpus import Gpus, read_gpus
from tensorserve.host_memory import SLICED_BYTES, automatic_limit, largest_needs
from tensorserve.layouts import check_layout, has_head, is_vllm_layout
from tensorserve.lora import adapters_of
from tensorserve.manifest import MANIFEST, Manifest, check_index
from tensorserve.memory_group import available_bytes
from tensorserve.opening import (
    OpenTensors,
    access_for,
    has_key,
    key_for,
    open_manifest,
    open_tensors,
)
from tensorserve.plan import SHARD_PATTERN, LaunchPlan, shard_name, trusts_code, wants_adapters
from tensorserve.prefetching import may_share
from tensorserve.ranks import Ranks, has_flag, ranks_of
from tensorserve.secret import redact_uri
from tensorserve.settings import Settings
from tensorserve.sources import Access, FetchObserver, NotFoundError
from tensorserve.start import Shard
from tensorserve.verification import DIGESTS, MODES, WARNINGS, verification_of

MIB = 1024**2
# vLLM's message queues between its processes, measured on 0.32.0 (CPU build): less ends in SIGBUS.
SHARED_MEMORY_BYTES = 160 * MIB
SHARED_MEMORY = Path("/dev/shm")
# What vLLM's wheels are built with where their version does not say it ("0.32.0+cu129").
_CUDA = 13
# The first driver with each CUDA: docs.nvidia.com/deploy/cuda-compatibility.
_DRIVERS = {12: "R525", 13: "R580"}
# With these, less than the whole checkpoint stays on the GPUs.
_SMALLER_ON_GPU = (
    *("--quantization", "-q", "--cpu-offload-gb", "--offload-group-size", "--offload-backend"),
)
# Event log, configuration and tokenizer of large models.
STATE_BYTES = 64 * MIB


@dataclass(frozen=True)
class Passed:
    """One check that holds: its name and what was found."""

    name: str
    found: str


@dataclass
class Weights:
    """What the checks of the source found out; filled by `check_source`."""

    shards: tuple[Shard, ...] = ()
    data_bytes: int = 0
    largest_bytes: int = 0
    """Of the largest tensor."""
    sliced: bool = True
    """Whether vLLM's weight loaders take slices of tensors, where there are several ranks: not in
    its own layout, where each tensor is a parameter."""
    draft_bytes: int = 0
    """Of a draft model with files of its own."""
    manifest: Manifest | None = None
    host_memory_limit: int | None = None
    """Bytes; filled by `check_host_memory`."""
    warning: str | None = None
    """What is weaker than it should be, to be said aloud."""

    @property
    def verification(self) -> str:
        """What vouches for the weights, one of verification.MODES: for the least of its files."""
        return max((shard.verification for shard in self.shards), key=MODES.index)


def run_checks(
    settings: Settings, plan: LaunchPlan, weights: Weights, observer: FetchObserver | None = None
) -> Iterator[Passed]:
    """Run every check in order; the first that fails raises its error. Fills `weights`."""
    ranks = ranks_of(plan.argv, plan.tensor_parallel_size)
    yield check_vllm()
    gpus = visible_gpus(dict(plan.environment))
    yield check_device(gpus, ranks)
    draft = draft_of(plan.argv)
    if draft is not None:
        where, weights.draft_bytes = check_draft(draft, settings.model_uri, dict(plan.environment))
        yield Passed("draft", where)
    yield check_port("API", plan.host, plan.port)
    yield check_shared_memory()
    yield check_state_dir(settings.state_dir)
    yield from check_source(settings, plan, weights, observer)
    if draft is not None:
        check_draft_layout(draft, weights)
    yield check_memory(
        weights.data_bytes + weights.draft_bytes,
        ranks,
        gpus,
        whole=not has_flag(plan.argv, *_SMALLER_ON_GPU),
    )
    yield check_host_memory(settings, plan, weights)


def engine_is_cpu() -> bool:
    """Whether the installed vLLM is the CPU build (its version says so: "0.32.0+cpu")."""
    return "cpu" in _vllm_version()


def check_vllm() -> Passed:
    """vLLM is installed, in the version that this release was tested with."""
    version = _vllm_version()
    if version.partition("+")[0] != vllm_flags.VLLM_VERSION:
        raise ConfigurationError(
            f"vLLM {version} is installed; this release is made for {vllm_flags.VLLM_VERSION}.",
            hint=f"pip install vllm=={vllm_flags.VLLM_VERSION}",
        )
    return Passed("vLLM", version)


def visible_gpus(environ: Mapping[str, str]) -> Gpus | None:
    """The GPUs that an engine with `environ` will see; None on the CPU build, or where nobody says.

    Raises ConfigurationError where there is none, or its driver's library cannot be used.
    """
    if engine_is_cpu():
        return None
    there = any(re.fullmatch(r"nvidia\d+", path.name) for path in Path("/dev").glob("nvidia*"))
    # Windows' Linux subsystem shows its GPUs through one device of another name.
    if not there and not Path("/dev/dxg").exists():
        raise ConfigurationError(
            "No GPU is visible, and the installed vLLM is the CUDA build.",
            hint="Start the container with `--gpus all` (NVIDIA's container toolkit on the host), "
            "or use the cpu image.",
        )
    return read_gpus(environ.get("CUDA_VISIBLE_DEVICES"))


def check_device(gpus: Gpus | None, ranks: Ranks) -> Passed:
    """There is a device for each rank on this machine, with a driver that carries vLLM's CUDA."""
    if engine_is_cpu():
        return Passed("device", f"CPU, {len(os.sched_getaffinity(0))} cores")
    if gpus is None:
        return Passed("device", "GPU; NVML is not here to say which")
    _check_driver(gpus)
    seen = len(gpus.visible)
    # Ray may put them all elsewhere.
    wanted = 0 if ranks.here is None else ranks.here
    if seen < wanted:
        hidden = gpus.present > seen
        raise ConfigurationError(
            f"{wanted} {'rank is' if wanted == 1 else 'ranks are'} to run on this machine, and "
            f"{_of_gpus(seen)} visible"
            + (f" ({gpus.present} without CUDA_VISIBLE_DEVICES)." if hidden else "."),
            hint="Each rank takes a GPU. Give the container more of them (`--gpus`, "
            "CUDA_VISIBLE_DEVICES), or set TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE and the other "
            "parallel sizes lower.",
        )
    used = ", ".join([f"{wanted} of {seen} GPUs", *(gpu.name for gpu in gpus.visible[:1])])
    return Passed("device", used + (f", driver {gpus.driver}" if gpus.driver else ""))


def _check_driver(gpus: Gpus) -> None:
    built = re.search(r"\+cu(\d+)\d$", _vllm_version())
    needed = int(built[1]) if built else _CUDA
    if gpus.cuda is not None and gpus.cuda < needed * 1000:
        carried = f"{gpus.cuda // 1000}.{gpus.cuda % 1000 // 10}"
        raise ConfigurationError(
            f"The NVIDIA driver {gpus.driver or ''} carries CUDA {carried}; the installed vLLM "
            f"needs CUDA {needed}.".replace("  ", " "),
            hint=f"Install driver {_DRIVERS.get(needed, 'of a later release')} or later on the "
            "host, and restart it. `nvidia-smi` shows the driver and its CUDA.",
        )


def _of_gpus(count: int) -> str:
    return "1 GPU is" if count == 1 else f"{count} GPUs are"


def check_port(what: str, host: str, port: int) -> Passed:
    """`host:port` can be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (UnicodeError, TypeError) as error:  # an empty label, one too long; bytes, not UTF-8
        raise ConfigurationError(f"The {what} cannot listen on {host!r}: no host name.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            variable = "TENSORSERVE_PORT" if what == "API" else "TENSORSERVE_METRICS_PORT"
            raise ConfigurationError(
                f"Port {port} on {host} is in use: the {what} cannot listen there.",
                hint=f"Stop what listens there, or set {variable} to a free port.",
            ) from error
        raise ConfigurationError(
            f"The {what} cannot listen on {host} port {port}: {error.strerror or error}."
        ) from error
    return Passed(f"{what} port", f"{host}:{port} is free")


def check_shared_memory(path: Path = SHARED_MEMORY) -> Passed:
    """/dev/shm has room for vLLM's queues; a container gets 64 MiB unless told otherwise."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}; vLLM needs shared memory.") from error
    if free < SHARED_MEMORY_BYTES:
        raise ConfigurationError(
            f"{path} has {free // MIB} MiB free, vLLM needs {SHARED_MEMORY_BYTES // MIB} MiB.",
            hint="Start the container with `--shm-size 1g` (or `--ipc host`); on Kubernetes, mount "
            "an emptyDir of `medium: Memory` there.",
        )
    return Passed("shared memory", f"{free // MIB} MiB free")


def check_state_dir(path: Path) -> Passed:
    """The state directory is ours, private and writable."""
    prepare_state_dir(path)
    free = shutil.disk_usage(path).free
    if free < STATE_BYTES:
        raise ConfigurationError(
            f"{path} has {free // MIB} MiB free, {STATE_BYTES // MIB} MiB are needed.",
            hint="Give the tmpfs more room, or set TENSORSERVE_STATE_DIR.",
        )
    return Passed("state directory", f"{path}, {free // MIB} MiB free")


def prepare_state_dir(path: Path) -> None:
    """Make `path` (0700), or refuse it if it belongs to somebody else or cannot be written."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
        if path.is_symlink() or info.st_uid != os.getuid():
            raise ConfigurationError(
                f"{path} belongs to another user or is a link.",
                hint="Set TENSORSERVE_STATE_DIR to a directory of your own.",
            )
        path.chmod(0o700)
        probe = path / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}.",
            hint="Mount a tmpfs there, or set TENSORSERVE_STATE_DIR to a writable directory.",
        ) from error


def check_source(
    settings: Settings, plan: LaunchPlan, weights: Weights, observer: FetchObserver | None
) -> Iterator[Passed]:
    """Every shard is there, whole, a .tensors file, and opened by the key; so is config.json."""
    yield from check_weights(settings, plan, weights, observer)
    access = access_for(settings)
    check_config(plan.bundle_uri, access)
    if trusts_code(plan) and has_key(settings):
        # Before vLLM starts, and in `check`; the files are fetched by the same rule.
        artifact_names(plan.bundle_uri, access, weights.manifest, remote_code=True, sealed=True)
    yield Passed("configuration", f"config.json is there, {_bound(weights.manifest)}")
    if (adapters := adapters_of(weights.manifest)) and wants_adapters(plan):
        if plan.served_name in adapters:
            raise ConfigurationError(
                f"The bundle has an adapter {plan.served_name!r}, and the model is served under "
                "this name.",
                hint="Set TENSORSERVE_MODEL_NAME to another name.",
            )
        yield Passed("adapters", ", ".join(adapters))


def check_weights(
    settings: Settings, plan: LaunchPlan, weights: Weights, observer: FetchObserver | None
) -> Iterator[Passed]:
    """Every shard is there, whole, a .tensors file, and opened by the key."""
    access = access_for(settings)
    key = key_for(settings)
    firsts = [plan.shards(template)[0] for template in plan.tensors]
    manifest = weights.manifest = open_manifest(
        plan.bundle_uri, access, key, firsts, pin=settings.manifest_sha256
    )
    vouched = manifest.tensors_files if manifest else {}
    # Another file may stand beside a bundle's own, and be named in the URI.
    own = any(name in vouched for template in plan.tensors for name in plan.shards(template))
    fingerprint = manifest.fingerprint if manifest and own else None
    if fingerprint is not None:
        check_engine(fingerprint, plan)
    template, first = _first_shard(plan, access, key, observer, manifest)
    opened = [first]
    try:
        for name in plan.shards(template)[1:]:
            opened.append(
                open_tensors(sources.join(plan.bundle_uri, name), access, key, observer=observer)
            )
        ranks, sharded = plan.tensor_parallel_size, bool(SHARD_PATTERN.search(template))
        for one in opened:
            check_layout(
                one.index, one.source.name, ranks, sharded=sharded, fingerprinted=bool(fingerprint)
            )
        names = plan.shards(template)
        for name, one in zip(names, opened, strict=True):
            # A manifest that is believed names every file there is.
            if manifest and (name in vouched or manifest.vouched_by or len(plan.tensors) > 1):
                check_index(manifest, name, one.index)
        weights.data_bytes = sum(o.index.data_bytes for o in opened)
        weights.largest_bytes = max((r.length for o in opened for r in o.index.tensors), default=0)
        weights.sliced = fingerprint is None and not is_vllm_layout(first.index)
        weights.shards = tuple(
            _shard(settings, plan, name, one, manifest, fingerprint)
            for name, one in zip(names, opened, strict=True)
        )
        if first.index.encrypted:
            weights.warning = WARNINGS.get(weights.verification)
        tensors = sum(len(o.index.tensors) for o in opened)
        yield Passed(
            "weights",
            f"{first.source.name}: {tensors} tensors, {weights.data_bytes / 1e9:.3f} GB"
            + (f" in {len(opened)} shards" if len(opened) > 1 else ""),
        )
        if fingerprint is not None:
            yield Passed("layout", f"vLLM's own, for {fingerprint}")
        secured = "encrypted, the key opens it" if first.index.encrypted else "not encrypted"
        yield Passed("encryption", secured)
        yield Passed("verification", _verified(weights))
    finally:
        for one in opened:
            one.source.close()


def _shard(
    settings: Settings,
    plan: LaunchPlan,
    name: str,
    opened: OpenTensors,
    manifest: Manifest | None,
    fingerprint: Fingerprint | None,
) -> Shard:
    """What the loader is told of a file. Raises CorruptError where nothing could vouch for it."""
    index, source = opened.index, opened.source
    entry = manifest.tensors_files.get(name) if manifest else None
    rule = verification_of(
        settings.verify, manifest, name, encrypted=index.encrypted, pinned=source.pinned
    )
    if index.encrypted and rule.mode == DIGESTS and index.tensors:
        # One of them says it in time. The loader asks every tensor.
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
        "manifest": f"{MANIFEST} vouches for every byte",
        "digests": "each tensor's own digest, no authenticated manifest",
        "tags": "the chunks' tags alone",
        "none": "nothing vouches for them",
    }[weights.verification]


def _bound(manifest: Manifest | None) -> str:
    if manifest is None:
        return "no manifest"
    return (
        "bound by the manifest" if manifest.vouched_by else "in a manifest that nobody vouches for"
    )


def check_engine(fingerprint: Fingerprint, plan: LaunchPlan) -> None:
    """As far as it is known without vLLM, the engine is the one whose parameters were packed."""
    here = dict(plan.engine) | {
        "vllm": _vllm_version().partition("+")[0],
        "device": "cpu" if engine_is_cpu() else "cuda",
        "tensor_parallel_size": plan.tensor_parallel_size,
    }
    check_fingerprint(fingerprint, here)


def check_draft_layout(draft: Draft, weights: Weights) -> None:
    """A draft that is part of the model is in the bundle, where that holds a checkpoint."""
    if draft.model is None and any(shard.fingerprint for shard in weights.shards):
        raise ConfigurationError(
            f"The bundle is in vLLM's own layout, without what {draft.method!r} drafts with.",
            hint="Pack the checkpoint without --layout vllm: such a bundle holds all of it.",
        )


def check_config(bundle_uri: str, access: Access) -> None:
    """The bundle has a config.json; without it vLLM fails after a minute of imports."""
    uri = sources.join(bundle_uri, "config.json")
    try:
        sources.open_source(uri, access).close()
    except NotFoundError as error:
        raise CorruptError(
            f"The bundle has no config.json: {redact_uri(uri)}",
            hint="vLLM needs the model's config.json (and its tokenizer) beside the .tensors file. "
            "Pack the model with `tensorserve pack`, or copy them there.",
        ) from error


def check_memory(
    data_bytes: int, ranks: Ranks | None = None, gpus: Gpus | None = None, *, whole: bool = True
) -> Passed:
    """The weights fit into the memory of the devices that will hold them; each rank a part.

    `whole` is False where vLLM itself makes them smaller, or leaves a part in host memory.
    """
    ranks = ranks or Ranks()
    if engine_is_cpu():
        return _check_on_host(data_bytes, ranks)
    if gpus is None:
        return Passed("memory", "not known")
    share = ranks.part(data_bytes)
    which = "The weights are" if ranks.parts == 1 else f"A rank's part of {ranks.parts} is"
    used = gpus.visible[: 1 if ranks.here is None else ranks.here]
    if any(gpu.unified for gpu in used):
        return _check_on_host(data_bytes, ranks)
    for gpu in used:
        if whole and gpu.total is not None and share > gpu.total:
            raise ConfigurationError(
                f"{which} {share / 1e9:.2f} GB, {gpu.name} has {gpu.total / 1e9:.2f} GB.",
                hint="Use a larger GPU, a smaller or quantized model, or more GPUs with "
                "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE.",
            )
        if whole and gpu.total is not None and gpu.free is not None and share > gpu.free:
            raise ConfigurationError(
                f"{which} {share / 1e9:.2f} GB, {gpu.name} has {gpu.free / 1e9:.2f} GB free of "
                f"{gpu.total / 1e9:.2f} GB.",
                hint="Another process holds the rest: `nvidia-smi` on the host shows it. Stop it, "
                "or choose another GPU with CUDA_VISIBLE_DEVICES.",
            )
    known = [gpu for gpu in used if gpu.total is not None and gpu.free is not None]
    if not known:
        return Passed("memory", f"not known ({used[0].trouble})" if used else "not known")
    least = min(known, key=lambda gpu: gpu.free or 0)
    of = "" if ranks.parts == 1 else " for each rank"
    return Passed(
        "memory",
        f"{share / 1e9:.2f} GB{of}, {least.name} has {(least.free or 0) / 1e9:.2f} GB free of "
        f"{(least.total or 0) / 1e9:.2f} GB",
    )


def _check_on_host(data_bytes: int, ranks: Ranks) -> Passed:
    available = available_bytes()
    if available is None:
        return Passed("memory", "not known")
    # Each data-parallel replica on this machine has the weights for itself.
    share = (
        data_bytes // ranks.machines if ranks.here is None else ranks.part(data_bytes) * ranks.here
    )
    which = "The weights are" if share == data_bytes else "This machine's part of the weights is"
    if share > data_bytes:
        which = f"The weights of {ranks.here} ranks are"
    if share > available:
        raise ConfigurationError(
            f"{which} {share / 1e9:.2f} GB, host memory has {available / 1e9:.2f} GB.",
            hint="Use a larger machine, a smaller or quantized model, or more machines.",
        )
    return Passed("memory", f"{share / 1e9:.2f} GB of {available / 1e9:.2f} GB in host memory")


def check_host_memory(settings: Settings, plan: LaunchPlan, weights: Weights) -> Passed:
    """How much host memory the load may take. Fills `weights`.

    Raises ConfigurationError where ranks on GPUs hold tensors as a whole in more than there is.
    """
    name, limit = "host memory for the load", settings.host_memory_limit
    ranks, available = ranks_of(plan.argv, plan.tensor_parallel_size), available_bytes()
    if limit is not None:
        weights.host_memory_limit = limit
        _check_largest(settings, plan, weights, ranks, available)
        return Passed(name, f"{limit / 1e9:.2f} GB, as TENSORSERVE_HOST_MEMORY_LIMIT says")
    # Where Ray places them, nobody knows yet.
    here = max(1, ranks.parts // ranks.machines) if ranks.here is None else ranks.here
    fetches = may_share(weights.shards) and (settings.prefetch != "off" or here > 1)
    held = ranks.part(weights.data_bytes) * here if engine_is_cpu() else 0
    limit = automatic_limit(available, here, held=held, fetches=fetches)
    weights.host_memory_limit = limit
    _check_largest(settings, plan, weights, ranks, available)
    known = "not known how much is" if available is None else f"{available / 1e9:.2f} GB"
    return Passed(name, f"{limit / 1e9:.2f} GB for {here} rank(s), automatic: {known} available")


def _check_largest(
    settings: Settings, plan: LaunchPlan, weights: Weights, ranks: Ranks, available: int | None
) -> None:
    if engine_is_cpu() or available is None or ranks.here is None:
        return
    largest, limit = weights.largest_bytes, weights.host_memory_limit or 0
    parallel = plan.tensor_parallel_size > 1 or has_flag(
        plan.argv, "--enable-expert-parallel", "-ep"
    )
    if weights.sliced and parallel and largest > SLICED_BYTES:
        why = "to take its slice of it"
    elif settings.loader == "reference":
        why = "as TENSORSERVE_LOADER=reference reads it"
    elif any(shard.check_digests for shard in weights.shards):
        why = "to compare its digest"
    else:
        return
    needed = largest_needs(largest, ranks.here, limit)
    if needed > available:
        raise ConfigurationError(
            f"Each rank holds the largest tensor, {largest / 1e9:.2f} GB, in host memory as a "
            f"whole, {why}: the load takes {needed / 1e9:.2f} GB for {ranks.here} rank(s) on this "
            f"machine, and {available / 1e9:.2f} GB are available.",
            hint="Give the container more memory, run fewer ranks on the machine, or set "
            "TENSORSERVE_HOST_MEMORY_LIMIT lower: half of it counts here.",
        )


def _first_shard(
    plan: LaunchPlan,
    access: Access,
    key: FileKey | None,
    observer: FetchObserver | None,
    manifest: Manifest | None,
) -> tuple[str, OpenTensors]:
    """The template among the plan's candidates whose first file exists, and that file.

    Where a manifest is vouched for, it says which there are, and how many of them: a server that
    hides one must not decide it.
    """
    vouched = manifest.tensors_files if manifest and manifest.vouched_by else {}
    named = [template for template in plan.tensors if plan.shards(template)[0] in vouched]
    for template in named[:1]:
        _check_count(template, plan, vouched)
        uri = sources.join(plan.bundle_uri, plan.shards(template)[0])
        return template, open_tensors(uri, access, key, observer=observer)
    missing: NotFoundError | None = None
    for template in plan.tensors:
        uri = sources.join(plan.bundle_uri, plan.shards(template)[0])
        try:
            opened = open_tensors(uri, access, key, observer=observer)
        except NotFoundError as error:
            missing = missing or error
            continue
        if not SHARD_PATTERN.search(template):
            return template, opened
        beyond = sources.join(plan.bundle_uri, shard_name(template, plan.tensor_parallel_size))
        try:
            sources.open_source(beyond, access).close()
        except NotFoundError:
            return template, opened
        opened.source.close()
        raise _other_count(f"more shards than {plan.tensor_parallel_size}", "larger")
    assert missing is not None
    raise missing


def _check_count(template: str, plan: LaunchPlan, vouched: Collection[str]) -> None:
    """Raises ConfigurationError unless `template` means as many files as the manifest names."""
    wanted = plan.shards(template)
    if not SHARD_PATTERN.search(template):
        return
    before, after = SHARD_PATTERN.split(template)
    pattern = re.compile(rf"{re.escape(before)}\d+{re.escape(after)}")
    there = {name for name in vouched if pattern.fullmatch(name)}
    if there != set(wanted):
        size = "larger" if len(there) > len(wanted) else "smaller"
        raise _other_count(f"{len(there)} shards by its {MANIFEST}, not {len(wanted)}", size)


def _other_count(found: str, size: str) -> ConfigurationError:
    return ConfigurationError(
        f"The bundle has {found}: it was made for a {size} tensor-parallel size.",
        hint="Set TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE to the number of its shards.",
    )


def _vllm_version() -> str:
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError as error:
        raise ConfigurationError(
            "vLLM is not installed.", hint=f"pip install vllm=={vllm_flags.VLLM_VERSION}"
        ) from error
