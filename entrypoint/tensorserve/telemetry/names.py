"""Which names may an event or a metric hold, and which words do people read for them?

The names are part of the public interface: docs/metrics.md lists them. The words are for the start
page and may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """A part of a start, in order. Each phase begins where the one before ends."""

    PREFLIGHT = "preflight"
    ARTIFACTS = "artifacts"
    IMPORT = "import"
    INIT = "init"
    LOAD = "load"
    POSTPROCESS = "postprocess"
    WARMUP = "warmup"


PHASES = tuple(Phase)


class Condition(StrEnum):
    """A start in which no phase runs."""

    WAITING = "waiting"
    """No start is in the log yet."""
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class Edge(StrEnum):
    """Which end of a phase an event marks."""

    BEGIN = "begin"
    END = "end"


class Stage(StrEnum):
    """What a byte of the weights goes through, in order."""

    FETCH = "fetch"
    DECRYPT = "decrypt"
    COPY = "copy"


class Sharing(StrEnum):
    """Whether a rank shares the load with others (`shared`), or why not."""

    SHARED = "shared"
    ONE_RANK = "one_rank"
    """No other tensor-parallel rank."""
    OFF = "off"
    """TENSORSERVE_SHARE_LOAD=off."""
    AUTO = "auto"
    """TENSORSERVE_SHARE_LOAD=auto, which is the default."""
    REFERENCE = "reference"
    """tensorizer's own reader reads."""
    LAYOUT = "layout"
    """The file is in vLLM's own layout, or of one rank alone."""
    MACHINES = "machines"
    """The ranks are on several machines."""
    DEVICE = "device"
    """Neither a CPU nor CUDA, or ranks that come and go."""
    NOTHING = "nothing"
    """No tensor is loaded by all ranks."""


class Check(StrEnum):
    """A check of preflight. Its name is also the word that people read."""

    VLLM = "vLLM"
    DEVICE = "device"
    DRAFT = "draft"
    API_PORT = "API port"
    API_SOCKET = "API socket"
    METRICS_PORT = "metrics port"
    SHARED_MEMORY = "shared memory"
    STATE_DIRECTORY = "state directory"
    SIGNATURE = "signature"
    KEY = "key"
    WEIGHTS = "weights"
    LAYOUT = "layout"
    ENCRYPTION = "encryption"
    VERIFICATION = "verification"
    CONFIGURATION = "configuration"
    ADAPTERS = "adapters"
    MEMORY = "memory"
    HOST_MEMORY = "host memory for the load"
    FILES = "files"
    KERNELS = "kernels"


REFERENCE_LOADER = "reference"
"""The value of TENSORSERVE_LOADER for tensorizer's own reader."""
BROUGHT, KEPT, ABSENT, NO_PLACE, UNUSED = "brought", "kept", "absent", "no_place", "unused"
"""What becomes of a bundle's compiled code (schema.py, CompiledCacheKnown.result)."""
ENGINE_ENDED = "engine"
"""The failure reason of an engine that ended by itself, without an error of ours."""
OTHER = "other"
"""In place of a name that is not one of ours: labels take no user data."""


@dataclass(frozen=True)
class PhaseWords:
    """`title`: of its row in the time line; `running` and `done`: as a sentence without its end."""

    title: str
    running: str
    done: str


PHASE_WORDS: Mapping[Phase, PhaseWords] = {
    Phase.PREFLIGHT: PhaseWords("Checks", "Checking that everything is there", "All checks passed"),
    Phase.ARTIFACTS: PhaseWords(
        "Small files",
        "Fetching the configuration and the tokenizer",
        "Configuration and tokenizer are there",
    ),
    Phase.IMPORT: PhaseWords("vLLM starts", "vLLM is starting", "vLLM has started"),
    Phase.INIT: PhaseWords(
        "Empty model", "Setting up the empty model", "The empty model is set up"
    ),
    Phase.LOAD: PhaseWords("Load weights", "Loading the model", "The weights are in the model"),
    Phase.POSTPROCESS: PhaseWords(
        "Prepare", "Preparing the weights for the device", "The weights are prepared"
    ),
    Phase.WARMUP: PhaseWords("Warm up", "Warming up the engine", "The engine is warm"),
}


@dataclass(frozen=True)
class FailureWords:
    """`short`: after "Failed: "; `hint`: what to do now."""

    short: str
    hint: str


FAILURES: Mapping[str, FailureWords] = {
    "wrong_key": FailureWords("wrong key", "The key or passphrase does not open this model."),
    "corrupt": FailureWords(
        "the model is damaged",
        "A file is damaged, incomplete or was replaced. `tensorserve verify` names it.",
    ),
    "signature": FailureWords(
        "the model's signature is not accepted",
        "The model is not signed, or not by an accepted signer, or was changed since. The "
        "container's log says which.",
    ),
    "not_found": FailureWords(
        "the model was not found",
        "A file of the model does not exist. Check the model's address, and whether the file was "
        "deleted or renamed.",
    ),
    "source_unavailable": FailureWords(
        "the source cannot be reached", "Check the network and the model's address."
    ),
    "permission": FailureWords(
        "no permission", "The credentials are missing, wrong, expired or insufficient."
    ),
    "configuration": FailureWords("wrong configuration", "`tensorserve plan` names each mistake."),
    "usage": FailureWords("wrong command", "`tensorserve --help` shows the right one."),
    "internal": FailureWords(
        "internal error",
        "This is a bug in tensorserve: please report it. If it happened during the load, "
        "TENSORSERVE_LOADER=reference may load the model until it is fixed.",
    ),
    "out_of_memory": FailureWords(
        "out of memory",
        "The kernel ended a process of the engine. Raise the container's memory limit.",
    ),
    "start_stalled": FailureWords(
        "the start came to a stand",
        "Nothing advanced for TENSORSERVE_START_DEADLINE. The container's log shows the last thing "
        "that vLLM printed.",
    ),
    "worker_lost": FailureWords(
        "a worker was lost",
        "One of vLLM's workers died or failed before the model was served. Its traceback is in the "
        "container's log.",
    ),
    ENGINE_ENDED: FailureWords("the engine ended", "Its output in the container's log says why."),
}
"""By the `reason` of an error (errors.py, sources/base.py), and ENGINE_ENDED."""

CAUTIONS: Mapping[str, str] = {
    "digests": "No authenticated manifest: the weights are compared with the digests in their own "
    "file only, and configuration and tokenizer are not authenticated. `tensorserve sign` adds a "
    "manifest.",
    "tags": "TENSORSERVE_VERIFY=tags: tensors may have been exchanged for one another. "
    "`tensorserve sign` adds a manifest.",
}
"""By the mode of verification (bundle/trust.py: MODES), where it is weaker than it could be."""

RETRIES: Mapping[str, str] = {
    "reset": "connection reset",
    "short_body": "answer cut short",
    "stall": "no data for too long",
    "slow": "a connection was slow",
    "moved": "a signed address expired",
    "dns": "name not found",
    "connect": "no connection",
    "tls": "TLS error",
    "proxy": "the proxy gave no connection",
    "transport": "network error",
    "expired": "credentials expired",
    "credentials": "no answer from the credentials provider",
    "key_service": "no answer from the key service",
    "corrupt": "data arrived damaged",
    "wrong_range": "another range was sent",
    "no_version": "the answer had no version",
    "request_timeout": "the source got no request in time",
}
"""Why a request is sent again, by the `reason` of TryAgain (sources/retry.py); `status_NNN` is for
the status of an HTTP answer."""
STATUS_PREFIX = "status_"
