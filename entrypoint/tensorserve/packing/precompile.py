"""How does `tensorserve precompile URI` put compiled code into a bundle?

It starts the engine as `up` does, with empty caches in the place where a server unpacks them, sends
requests, stops it, and seals what was written. It is a job of its own: servers need no right to
write the bundle.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tensorserve import sources
from tensorserve.bundle.compiled import Contents, name_of, seal
from tensorserve.bundle.compiled_archive import files_below, pack_files
from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.manifest import Manifest, read_manifest
from tensorserve.bundle.tensors_file import OpenTensors, open_tensors
from tensorserve.config.access import access_for, key_for
from tensorserve.config.launch_plan import LaunchPlan, make_plan
from tensorserve.config.settings import Settings
from tensorserve.config.unwrapping import with_key
from tensorserve.config.value_parsers import COMPILING
from tensorserve.config.vllm_arguments import parse_arguments
from tensorserve.crypto.ed25519 import SigningKey
from tensorserve.crypto.secret_file import read_secret
from tensorserve.errors import ConfigurationError, TensorserveError
from tensorserve.format import PasswordHash, read_header
from tensorserve.launch.compiled_cache import sealed_for
from tensorserve.linux import end_with_parent
from tensorserve.packing.destination import add_file, refuse_unwritable
from tensorserve.packing.warm_requests import Engine, Sent, send_requests
from tensorserve.packing.weight_scan import WeightScan, scan_for
from tensorserve.secret import redact_uri
from tensorserve.telemetry import events_path, read_state
from tensorserve.telemetry.compiled_keys import compiled_keys
from tensorserve.telemetry.schema import CompiledCacheKnown

_URI, _MODE, _STATE = "TENSORSERVE_MODEL_URI", "TENSORSERVE_COMPILED", "TENSORSERVE_STATE_DIR"
# Of the way in which the API listens and logs; no part of the fingerprint. The job asks over plain
# HTTP.
_ACCESS_LOG = "disable-uvicorn-access-log"
_FRONT_DOOR = (
    "host", "port", "uds", "api-key", "root-path", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs",
    "ssl-cert-reqs", "ssl-ciphers", "enable-ssl-refresh", "grpc-port", _ACCESS_LOG,
)  # fmt: skip
_STOP_SECONDS = 120.0
_TICK = 0.2


@dataclass(frozen=True)
class Precompiled:
    """What was put into the bundle. ``str()`` gives the lines for the terminal."""

    bundle: str  # redacted
    name: str
    contents: Contents
    models: int
    """Compiled models: keys of vLLM's own."""
    sent: Sent
    signed: bool

    def __str__(self) -> str:
        contents = self.contents
        return (
            f"{self.bundle}: {self.name}, {contents.archive_bytes / 1e6:.1f} MB\n"
            f"  {contents.files} files, {contents.files_bytes / 1e6:.1f} MB unpacked, "
            f"{self.models} compiled models; {self.sent}; "
            f"{'signed' if self.signed else 'not signed'}"
        )


def precompile(
    uri: str,
    environ: Mapping[str, str],
    arguments: tuple[str, ...],
    sign_key: Path | None,
    say: Callable[[str], None] = lambda _: None,
) -> Precompiled:
    """Compiles for the bundle at `uri` (a directory or s3://…) with the settings of `environ`.

    `arguments` are for `vllm serve`. `sign_key` is a PEM file with an Ed25519 private key. Raises
    ConfigurationError before anything is started if the result could not be sealed or written,
    the engine's failure with its exit code, and the sources' errors.
    """
    refuse_unwritable(uri)
    if uri.endswith(".tensors"):
        raise ConfigurationError(
            "Compiled code belongs to a whole bundle, not to a single file.",
            hint="Give the URI of the bundle's directory.",
        )
    with tempfile.TemporaryDirectory(prefix="tensorserve-precompile-") as directory:
        work = Path(directory)
        environment, words = job_environment(environ, arguments, uri, work)
        settings = Settings.from_environment(environment)
        plan = make_plan(settings, words)
        settings = with_key(settings, plan.bundle_uri)
        signing_key = None
        if sign_key is not None:
            signing_key = SigningKey.parse(read_secret(sign_key, f"The signing key {sign_key}"))
        manifest, key = _sealable(settings, plan)
        with _removing_caches(settings.state_dir):
            with _running(environment, words) as process:
                known = _wait_ready(process, settings.state_dir)
                say("the engine is ready; sending requests")
                engine = Engine(f"http://127.0.0.1:{plan.port}")
                sent = send_requests(engine, plan.options.max_num_seqs)
            folder = Path(known.folder)
            models, place = len(compiled_keys(folder)), folder.parent
            names = files_below(place)
            say(f"looking for weights in {len(names)} files")
            scan, derivation = _scan(settings, plan, manifest)
            scan.refuse(place, names)
            with (work / "archive").open("x+b") as archive, (work / "sealed").open("x+b") as sealed:
                contents = pack_files(place, names, archive)
                archive.seek(0)
                seal(
                    archive,
                    sealed,
                    contents,
                    fingerprint=known.fingerprint,
                    key=key,
                    derivation=None if settings.compiled_key is not None else derivation,
                    signing_key=signing_key,
                )
                name = name_of(known.fingerprint)
                add_file(plan.bundle_uri, name, sealed, access_for(settings))
    return Precompiled(
        redact_uri(plan.bundle_uri), name, contents, models, sent, signing_key is not None
    )


def job_environment(
    environ: Mapping[str, str], arguments: tuple[str, ...], uri: str, work: Path
) -> tuple[dict[str, str], tuple[str, ...]]:
    """(environment, arguments) of the engine: the user's, but for where it listens."""
    variables = {_variable(name) for name in _FRONT_DOOR}
    left_out = variables | {f"{name}_FILE" for name in variables}
    left_out |= {"VLLM_API_KEY", "VLLM_API_KEY_FILE"}
    kept = {name: value for name, value in environ.items() if name not in left_out}
    (work / "state").mkdir(mode=0o700)
    api, metrics = _free_ports(2)
    ours = {
        _URI: uri,
        _MODE: COMPILING,
        _STATE: str(work / "state"),
        "TENSORSERVE_HOST": "127.0.0.1",
        "TENSORSERVE_PORT": str(api),
        "TENSORSERVE_METRICS_HOST": "127.0.0.1",
        "TENSORSERVE_METRICS_PORT": str(metrics),
        "TENSORSERVE_ENGINE_RESTARTS": "0",
        "TENSORSERVE_FAILURE_LINGER": "0",
        # A line for each of hundreds of requests would hide the others.
        _variable(_ACCESS_LOG): "true",
    }
    return kept | ours, parse_arguments(arguments).without(*_FRONT_DOOR).words()


def _variable(flag: str) -> str:
    return f"TENSORSERVE_VLLM_{flag.upper().replace('-', '_')}"


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


def _sealable(settings: Settings, plan: LaunchPlan) -> tuple[Manifest, ModelKey]:
    """What the sealed file is bound to. Raises ConfigurationError where there is nothing."""
    manifest = read_manifest(
        plan.bundle_uri, access_for(settings), key_for(settings), pin=settings.manifest_sha256
    )
    return sealed_for(settings, manifest)


@contextmanager
def _removing_caches(state_dir: Path) -> Iterator[None]:
    """Afterwards, the caches of the engine that ran with `state_dir` are removed."""
    try:
        yield
    finally:
        path = events_path(state_dir)
        known = read_state(path).compiled if path.exists() else None
        if known is not None and known.result == COMPILING:
            shutil.rmtree(Path(known.folder).parent, ignore_errors=True)


@contextmanager
def _running(
    environment: dict[str, str], words: tuple[str, ...]
) -> Iterator[subprocess.Popen[bytes]]:
    """The engine, as `up` runs it; it is ended with the block."""
    command = [sys.executable, "-m", "tensorserve.cli", "up"]
    process = subprocess.Popen(
        [*command, "--", *words] if words else command,
        env=environment,
        stdin=subprocess.DEVNULL,
        # This job's own output is what a script reads.
        stdout=sys.stderr.fileno(),
        # A job that is killed leaves no engine behind. It has one thread here.
        preexec_fn=end_with_parent,
    )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _StartFailedError(TensorserveError):
    """The engine's start failed; `exit_code` is that of `up`."""

    def __init__(self, code: int) -> None:
        super().__init__(
            f"The engine ended with code {code} before it was ready.",
            hint="Its output above says why. Does `tensorserve up` start with these settings?",
        )
        self.exit_code = code or TensorserveError.exit_code  # type: ignore[misc]


def _wait_ready(process: subprocess.Popen[bytes], state_dir: Path) -> CompiledCacheKnown:
    """Where the engine compiles, once it is ready. Raises _StartFailedError where it ends."""
    while True:
        code = process.poll()
        path = events_path(state_dir)
        state = read_state(path) if path.exists() else None
        if code is not None:
            raise _StartFailedError(code)
        if state is not None and state.ready:
            if state.compiled is None:
                raise TensorserveError("The engine has not said where it compiles.")
            return state.compiled
        time.sleep(_TICK)


def _scan(
    settings: Settings, plan: LaunchPlan, manifest: Manifest
) -> tuple[WeightScan, PasswordHash | None]:
    """(scan for the model's weights, how its key is derived from a passphrase)."""
    access, key = access_for(settings), key_for(settings)
    opened: list[OpenTensors] = []
    try:
        for name in manifest.tensors_files:
            opened.append(open_tensors(sources.join(plan.bundle_uri, name), access, key))
        return scan_for(opened), _derivation(opened)
    finally:
        for one in opened:
            one.source.close()


def _derivation(opened: list[OpenTensors]) -> PasswordHash | None:
    for one in opened:
        if one.index.encrypted and one.index.tensors:
            return read_header(one.source, one.index.tensors[0], one.index).key_derivation
    return None
