"""How does `pack --layout vllm` get each rank's parameters without vLLM in its own process?

A child process builds the model with vLLM (packing/vllm_worker.py). Each of its ranks connects to a
Unix socket, lists its parameters, and sends the requested bytes. The key, the cipher and the
destination stay in this process. Messages are JSON or raw bytes; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tensorserve.bundle.engine_fingerprint import Fingerprint
from tensorserve.config import vllm_flags
from tensorserve.config.environment import child_environment
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError
from tensorserve.format import TensorSpec
from tensorserve.launch.preflight import check_shared_memory, check_vllm
from tensorserve.packing.dtype_conversion import Read
from tensorserve.packing.tensor_source import TensorsSource

# A request: (number of the tensor, first byte, number of bytes).
REQUEST = struct.Struct("<IQQ")
LOAD_FORMAT = "tensorserve-pack"
_POLL_SECONDS = 0.5
_END_SECONDS = 60
_STOP_SECONDS = 10
_SHOWN_LINES, _SHOWN_CHARACTERS = 15, 300
# The second form is pydantic's message, one line below its exception.
_EXCEPTION = re.compile(r"(\b(?:[A-Z]\w*(?:Error|Exception)|Exception): .+|Value error, .+)$")
_SEE_ABOVE = re.compile(r"initialization failed|See (?:stack trace|root cause)", re.IGNORECASE)


@contextmanager
def engine_parameters(
    source: Path, dtype: str | None, ranks: int, trust_remote_code: bool = False
) -> Iterator[tuple[Fingerprint, list[TensorsSource]]]:
    """(the engine's fingerprint, the parameters of each of its `ranks` tensor-parallel ranks).

    `source` is a Hugging Face directory or a safetensors file in one; `dtype` and
    `trust_remote_code` are vLLM's flags. The parameters can be read until the context ends; until
    then vLLM holds the model in memory. Raises ConfigurationError if vLLM is missing or cannot
    build the model, and a rank's error (ConfigurationError or CorruptError) about the checkpoint.
    """
    _require_vllm()
    if ranks > 1:
        check_shared_memory()  # for the ranks' queues; too little ends in SIGBUS
    with tempfile.TemporaryDirectory(prefix="tensorserve-pack-") as directory:
        log = Path(directory, "vllm.log")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{directory}/ranks")
            listener.listen(ranks)
            listener.settimeout(_POLL_SECONDS)
            process = _start(source, dtype, ranks, f"{directory}/ranks", log, trust_remote_code)
            connections: list[Connection] = []
            try:
                offers = _offers(listener, process, log, ranks, connections)
                yield (
                    Fingerprint.from_json(offers[0][1]["fingerprint"]),
                    [_source(connection, offer) for connection, offer in offers],
                )
                # All are closed before waiting: a rank that continued alone would wait for the
                # others.
                for connection in connections:
                    connection.close()
                # vLLM then ends by itself and removes its shared memory.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END_SECONDS)
            finally:
                stop(process)
                for connection in connections:
                    connection.close()


def vllm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the process that builds the model, from `environ`."""
    # Without secrets, as for a serving vLLM. Without access to the hub: the directory is complete.
    environment = dict(child_environment(environ, None)) | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Without it, the CPU build requires one NUMA node for each rank.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if "VLLM_PLUGINS" in environment:  # an allow-list; our plugin registers the load format
        environment["VLLM_PLUGINS"] += ",tensorserve"
    return environment


def _require_vllm() -> None:
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError as error:
        raise ConfigurationError(
            "--layout vllm needs vLLM, which is not installed here.",
            hint=f"pip install vllm=={vllm_flags.VLLM_VERSION}, or leave --layout out: layout "
            "'hf' needs no vLLM and serves any parallelism.",
        ) from error
    check_vllm()


def _start(
    source: Path, dtype: str | None, ranks: int, address: str, log: Path, code: bool
) -> subprocess.Popen[bytes]:
    directory = source if source.is_dir() else source.parent
    given = {
        "model": str(directory.resolve()),
        "source": str(source.absolute()),
        "dtype": dtype,
        "ranks": ranks,
        "address": address,
        "trust_remote_code": code,
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tensorserve.packing.vllm_worker", json.dumps(given)],
            env=vllm_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # A process group of its own, so that stop() ends its workers too and Ctrl-C reaches
            # only this process.
            start_new_session=True,
        )


def _offers(
    listener: socket.socket,
    process: subprocess.Popen[bytes],
    log: Path,
    ranks: int,
    connections: list[Connection],
) -> list[tuple[Connection, dict[str, Any]]]:
    """Each rank's connection and list of parameters, in rank order.

    All accepted connections are appended to `connections`, which the caller closes.
    """
    offers: dict[int, tuple[Connection, dict[str, Any]]] = {}
    while len(offers) < ranks:
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            if process.poll() is not None:
                raise _failed(log) from None
            continue
        connection = Connection(accepted.detach())
        connections.append(connection)
        try:
            offer = json.loads(connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise _failed(log) from error
        if said := offer.get("error"):
            kind = CorruptError if said["kind"] == "CorruptError" else ConfigurationError
            raise kind(said["message"], hint=said["hint"])
        offers[offer["rank"]] = (connection, offer)
    return [offers[rank] for rank in range(ranks)]


def _source(connection: Connection, offer: dict[str, Any]) -> TensorsSource:
    specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in offer["tensors"])
    numbers = {spec.name: number for number, spec in enumerate(specs)}

    request_lock = threading.Lock()

    def read(name: str, start: int, buffer: memoryview) -> None:
        try:
            with request_lock:
                connection.send_bytes(REQUEST.pack(numbers[name], start, len(buffer)))
                sent = connection.recv_bytes_into(buffer)
        except (EOFError, OSError) as error:
            raise TensorserveError(f"vLLM ended while {name!r} was read from it.") from error
        if sent != len(buffer):
            raise TensorserveError(f"vLLM sent {sent} bytes of {name!r}, not {len(buffer)}.")

    @contextmanager
    def reading() -> Iterator[Read]:
        yield read

    return TensorsSource(specs, reading)


def _failed(log: Path) -> ConfigurationError:
    printed = log.read_text(errors="replace").splitlines()
    lines = [line[:_SHOWN_CHARACTERS] for line in printed if line.strip()]
    said = "\n".join(f"    {line}" for line in lines[-_SHOWN_LINES:])
    return ConfigurationError(
        f"vLLM could not build the model: {_reason(lines)}\n{said}\n",
        hint="Try `vllm serve` with this model and --tensor-parallel-size on this machine. Layout "
        "'hf' needs no vLLM.",
    )


def _reason(lines: list[str]) -> str:
    """The last exception in vLLM's output that does not only refer to another one."""
    found = [match[1] for line in lines if (match := _EXCEPTION.search(line))]
    specific = [text for text in found if not _SEE_ABOVE.search(text)]
    return (specific or found or ["it ended."])[-1]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends vLLM and all of its ranks, with SIGTERM and, after 10 s, SIGKILL."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    # A rank that waits for another one that has ended would wait forever and ignore SIGTERM.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
