"""A real model, encrypted, served by real vLLM from disk, HTTP and S3, as stock vLLM serves it.

Each engine costs half a minute, so one run answers several questions; each question is a test.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_processes import named_processes, ways
from running import STOCK_PROMPTS, Tensorserve, request, session_processes
from s3server import S3Server

from key_services import OpenBao, openbao
from rangeserver import RangeServer
from s3_clients import s3_access
from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.manifest import read_manifest
from tensorserve.cli import main as tensorserve
from tensorserve.engine.api_key import OPEN_PATHS
from tensorserve.format import read_index, read_tensor
from tensorserve.launch.stopping import supervisor_seconds
from tensorserve.secret import Secret
from tensorserve.sources import Access, list_names, open_source

PROMPTS = STOCK_PROMPTS[:4]


@dataclass
class Bundle:
    """The model, packed and encrypted once."""

    directory: Path
    key_file: Path

    @property
    def key(self) -> bytes:
        return self.key_file.read_bytes()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Bundle:
    """Made with `tensorserve pack`, as a user would."""
    base = tmp_path_factory.mktemp("bundle")
    made = Bundle(base / "model", base / "key")
    words = ["pack", str(model_dir), str(made.directory), "--encrypt", "--key-file"]
    assert tensorserve([*words, str(made.key_file)]) == 0
    return made


@pytest.fixture(scope="module")
def bao() -> Iterator[OpenBao]:
    """With a wrapping key of today and one of tomorrow, and who may unwrap with each."""
    with openbao() as server:
        server.make_key("next")
        for key in ("models", "next"):
            server.policy(f"{key}-server", f"transit/decrypt/{key}")
        yield server


def by_vault(bao: OpenBao, key: str) -> dict[str, str]:
    """What a server has that may unwrap with `key` alone."""
    return {
        "TENSORSERVE_KEY_URI": f"vault:transit/{key}",
        "VAULT_ADDR": bao.url,
        "VAULT_TOKEN": bao.token_for(f"{key}-server"),
    }


def command(environ: dict[str, str], *words: str) -> int:
    """The exit code of a command with these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        return tensorserve(list(words))


@pytest.fixture(scope="module")
def s3_uri(s3: S3Server, bucket: str, bundle: Bundle, model_dir: Path, bao: OpenBao) -> str:
    """The same model packed straight into the bucket, its key wrapped by OpenBao."""
    uri = f"s3://{bucket}/vllm/smollm2/v1"
    environ = s3.environment | {"VAULT_ADDR": bao.url, "VAULT_TOKEN": bao.token}
    words = ["pack", str(model_dir), uri, "--encrypt", "--key-file", str(bundle.key_file)]
    assert command(environ, *words, "--wrap", "vault:transit/models") == 0
    return uri


@pytest.fixture
def rotated(s3: S3Server, s3_uri: str, bao: OpenBao, tmp_path: Path) -> Path:
    """That bundle, fetched from the bucket, after both rotations: the wrapping key has a new
    version, and another recipient is in the place of the first."""
    directory = tmp_path / "rotated"
    access = Access(s3=s3_access(s3))
    for name, size in (list_names(s3_uri, access) or {}).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        source = open_source(f"{s3_uri}/{name}", access)
        path.write_bytes(source.read(0, size))
        source.close()
    bao.rotate("models")
    environ = {"VAULT_ADDR": bao.url, "VAULT_TOKEN": bao.token}
    add, remove = ("--add", "vault:transit/next"), ("--remove", "vault:transit/models")
    assert command(environ, "rewrap", str(directory), *add, *remove) == 0
    assert command(by_vault(bao, "models"), "verify", str(directory)) == 65
    return directory


@pytest.fixture(scope="module")
def reference(stock_answers: dict[str, tuple[str, list[float]]]) -> list[tuple[str, list[float]]]:
    """What stock vLLM answers from the safetensors directory."""
    return [stock_answers[prompt] for prompt in PROMPTS]


# From S3, with a canary in every secret --------------------------------------------------------


@dataclass
class Canaries:
    """Secrets that must be found nowhere."""

    values: dict[str, bytes]

    def found_in(self, data: bytes) -> list[str]:
        """Names of the secrets in `data`."""
        return [name for name, value in self.values.items() if value in data]


@dataclass
class S3Run:
    engine: Tensorserve
    canaries: Canaries
    api_key: str
    metrics: list[bytes]


@pytest.fixture(scope="module")
def s3_run(
    tmp_path_factory: pytest.TempPathFactory,
    s3: S3Server,
    s3_uri: str,
    bundle: Bundle,
    bao: OpenBao,
) -> Iterator[S3Run]:
    """`up` from S3, its key unwrapped by OpenBao; each other secret by value in its environment."""
    api_key = "canary-" + secrets.token_hex(12)
    unwrapping = by_vault(bao, "models")
    canaries = Canaries(
        {
            "key": bundle.key.hex().encode(),
            "raw key": bundle.key,
            "vault token": unwrapping["VAULT_TOKEN"].encode(),
            "access key id": s3.access_key.encode(),
            "secret access key": s3.secret_key.encode(),
            "api key": api_key.encode(),
        }
    )
    environ = (
        s3.environment
        | unwrapping
        | {
            "TENSORSERVE_MODEL_URI": s3_uri,
            "TENSORSERVE_VLLM_API_KEY": api_key,
            "TENSORSERVE_VERIFY": "hashes",
        }
    )
    engine = Tensorserve(tmp_path_factory.mktemp("from-s3"), environ)
    metrics: list[bytes] = []
    with engine:
        # The exporter answers long before there is anything to serve.
        engine.wait_for(lambda: engine.get("/livez", engine.metrics_port)[0] == 200, 15)
        assert engine.get("/health")[0] == 0
        assert engine.get("/readyz", engine.metrics_port)[0] == 503
        metrics.append(engine.get("/metrics", engine.metrics_port)[1])
        engine.wait_ready()
        metrics.append(engine.get("/metrics", engine.metrics_port)[1])
        yield S3Run(engine, canaries, api_key, metrics)


def test_answers_from_s3_equal_those_of_stock_vllm(
    s3_run: S3Run, reference: list[tuple[str, list[float]]]
) -> None:
    """Text and log-probabilities, to the last bit, through the API key."""
    original = s3_run.engine.post

    def with_key(path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
        return original(path, body, Authorization=f"Bearer {s3_run.api_key}", **headers)

    s3_run.engine.post = with_key  # type: ignore[method-assign]
    assert s3_run.engine.completions("model", PROMPTS) == reference
    s3_run.engine.post = original  # type: ignore[method-assign]


def test_vllm_is_imported_once(s3_run: S3Run) -> None:
    """Its processes are forked from that import, and have their names and ids in the log."""
    if os.environ.get("TEST_IMPORT_ONCE") != "off":
        assert ways(s3_run.engine) == {
            "EngineCore": ("fork", None),
            "VllmWorker-0": ("fork", None),
        }
    assert named_processes(s3_run.engine).keys() == {"EngineCore", "Worker"}


def test_the_api_key_guards_the_api(s3_run: S3Run) -> None:
    """It reached vLLM, through memory, and guards every route but those that only say "I live"."""
    engine = s3_run.engine
    key = {"Authorization": f"Bearer {s3_run.api_key}"}
    status, listed = request(f"http://127.0.0.1:{engine.port}/openapi.json", headers=key)
    assert status == 200
    paths = {"/metrics", "/docs", "//v1/models", "/openapi.json", *json.loads(listed)["paths"]}
    assert {"/v1/completions", "/invocations", "/tokenize"} <= paths
    body = {"model": "model", "prompt": "x"}
    answers = {path: {engine.get(path)[0], engine.post(path, body)[0]} for path in paths}
    assert {path for path, codes in answers.items() if codes != {401}} == OPEN_PATHS


def test_no_secret_is_found_anywhere(s3_run: S3Run) -> None:
    """Logs, arguments, environments of all children, metrics, events, and files."""
    assert found_secrets(s3_run.engine, s3_run.canaries, s3_run.metrics) == {}


def found_secrets(
    engine: Tensorserve, canaries: Canaries, metrics: list[bytes]
) -> dict[str, list[str]]:
    """{place: names of the secrets in it}, over every place that somebody else can read."""
    assert engine.process is not None
    places: dict[str, bytes] = {"log": engine.log.read_bytes()}
    pids = session_processes(engine.process.pid)
    assert len(pids) >= 6, "up, supervisord, watch, engine, exporter, vLLM and its workers"
    for pid in pids:
        if pid != engine.process.pid:  # the user gave them to this one
            places[f"environ of {pid}"] = Path(f"/proc/{pid}/environ").read_bytes()
        places[f"cmdline of {pid}"] = Path(f"/proc/{pid}/cmdline").read_bytes()
    for number, text in enumerate(metrics):
        places[f"metrics {number}"] = text
    for path in ("/startupz", "/readyz", "/"):
        places[path] = engine.get(path, engine.metrics_port)[1]
    for file in engine.state_dir.rglob("*"):
        if file.is_file() and not file.is_symlink():
            places[str(file)] = file.read_bytes()
    assert any("events.jsonl" in name for name in places)
    return {name: hit for name, data in places.items() if (hit := canaries.found_in(data))}


def test_nothing_decrypted_lies_in_a_file(s3_run: S3Run, model_dir: Path) -> None:
    """No weights in the state directory: only small files."""
    sizes = [p.stat().st_size for p in s3_run.engine.state_dir.rglob("*") if p.is_file()]
    assert max(sizes) < (model_dir / "model.safetensors").stat().st_size / 10


def test_every_documented_metric_is_there(s3_run: S3Run) -> None:
    """After a start, each has a sample, and the stages' bytes are the file's."""
    engine = s3_run.engine
    size = engine.metric("tensorserve_load_size_bytes", rank="0")
    assert size
    for stage in ("fetch", "decrypt", "copy"):
        assert engine.metric("tensorserve_load_bytes_total", rank="0", stage=stage) == size
        seconds = engine.metric("tensorserve_load_stage_seconds_total", rank="0", stage=stage)
        assert seconds
        assert seconds > 0
    assert engine.metric("tensorserve_ready") == 1
    assert engine.metric("tensorserve_load_progress_ratio", rank="0") == 1
    assert engine.metric("tensorserve_startup_seconds")
    assert engine.metric("tensorserve_build_info") == 1
    assert engine.metric("tensorserve_fetch_requests_total")
    for phase in ("preflight", "artifacts", "import", "init", "load", "postprocess", "warmup"):
        assert engine.metric("tensorserve_phase_duration_seconds", phase=phase) is not None


def test_the_phases_add_up_to_the_start(s3_run: S3Run) -> None:
    """No gap that nobody accounts for, but our own first moments."""
    status, body = s3_run.engine.get("/startupz", s3_run.engine.metrics_port)
    assert status == 200
    told = json.loads(body)
    assert told["ready"] is True
    assert told["progress"] == 1
    assert sum(told["phases"].values()) <= told["startup_seconds"] + 0.1
    assert sum(told["phases"].values()) >= told["startup_seconds"] - 3


def test_a_dead_exporter_restarts_alone(s3_run: S3Run) -> None:
    """F14: the engine never notices, and the metrics come back whole."""
    engine = s3_run.engine
    pid = process_of(engine, "exporter")
    kill(pid)
    engine.wait_for(lambda: process_of(engine, "exporter") not in {None, pid}, 20)
    engine.wait_for(lambda: engine.get("/readyz", engine.metrics_port)[0] == 200, 20)
    assert engine.metric("tensorserve_load_bytes_total", stage="copy")
    assert [e["event"] for e in engine.events()].count("ready") == 1
    assert engine.get("/health")[0] == 200


def test_a_dead_engine_ends_the_container_with_its_code(s3_run: S3Run) -> None:
    """F13: vLLM's server is killed; nothing stays behind."""
    engine = s3_run.engine
    assert engine.process is not None
    session = engine.process.pid
    kill(process_of(engine, "vllm"))
    # However busy the machine is: a container that stays is what would fail this.
    assert engine.process.wait(120) == 128 + signal.SIGKILL, engine.text[-4000:]
    assert session_processes(session) == [], engine.text[-4000:]


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def process_of(engine: Tensorserve, what: str) -> int | None:
    """The process of `tensorserve <what>`, or `vllm serve`, if there is one."""
    assert engine.process is not None
    for pid in session_processes(engine.process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except FileNotFoundError:
            continue
        names = [Path(os.fsdecode(word)).name for word in words]
        wanted = ["vllm", "serve"] if what == "vllm" else ["tensorserve", what]
        if any(list(pair) == wanted for pair in itertools.pairwise(names)):
            return pid
    return None


# From HTTP, slowed ------------------------------------------------------------------------------


def test_from_http_progress_is_seen_and_answers_are_equal(
    tmp_path: Path, rotated: Path, bao: OpenBao, reference: list[tuple[str, list[float]]]
) -> None:
    """A slowed server, so that there is a middle to look at. The bundle is the one of the start
    from S3, its wrapping key rotated since then."""
    seen: list[float] = []
    with RangeServer(rotated, bytes_per_second=40e6) as server:
        environ = by_vault(bao, "next") | {
            "TENSORSERVE_MODEL_URI": server.url,
            # Else, where vLLM starts slowly, all of it is there before vLLM asks.
            "TENSORSERVE_PREFETCH": "off",
        }
        with Tensorserve(tmp_path, environ) as engine:

            def ready() -> bool:
                ratio = engine.metric("tensorserve_load_progress_ratio", rank="0")
                if ratio is not None:
                    seen.append(ratio)
                return engine.get("/readyz", engine.metrics_port)[0] == 200

            engine.wait_for(ready, 240)
            assert [ratio for ratio in seen if 0 < ratio < 1], seen
            assert seen == sorted(seen)
            size = engine.metric("tensorserve_load_size_bytes", rank="0")
            for stage in ("fetch", "decrypt", "copy"):
                assert engine.metric("tensorserve_load_bytes_total", stage=stage) == size
            assert engine.completions("model", PROMPTS) == reference
            assert engine.stop() == 143
        assert "tensorserve: load" in engine.text, "plain lines where there is no terminal"


# SIGTERM in the middle --------------------------------------------------------------------------


def test_sigterm_in_the_middle_of_a_load(tmp_path: Path, bundle: Bundle) -> None:
    """F12: its limits end before 5 s; no process left, exit code 143."""
    with RangeServer(bundle.directory, bytes_per_second=5e6) as server:
        environ = {
            "TENSORSERVE_MODEL_URI": server.url,
            "TENSORSERVE_KEY_FILE": str(bundle.key_file),
        }
        with Tensorserve(tmp_path, environ) as engine:
            engine.wait_for(lambda: any(e["event"] == "load_plan" for e in engine.events()), 240)
            assert engine.process is not None
            session = engine.process.pid
            assert len(session_processes(session)) >= 6
            engine.process.send_signal(signal.SIGTERM)
            # Not on the clock: other tests have the cores as well.
            assert supervisor_seconds(0, serving=False) < 5
            assert engine.process.wait(120) == 143, engine.text[-4000:]
            assert session_processes(session) == []


# From disk --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign_bundle(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, str]:
    """The model as tensorizer itself writes it: `write_module`, sealed with a passphrase.

    It holds what no checkpoint holds (computed buffers, the tied head twice), and no manifest.
    """
    from tensorizer import EncryptionParams, TensorSerializer
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("foreign")
    passphrase = "canary-" + secrets.token_hex(12)
    module = AutoModelForCausalLM.from_pretrained(model_dir, dtype="bfloat16")
    cheap = EncryptionParams.OpsLimit.MIN, EncryptionParams.MemLimit.MIN
    sealing = EncryptionParams.from_string(passphrase, opslimit=cheap[0], memlimit=cheap[1])
    serializer = TensorSerializer(str(directory / "model.tensors"), encryption=sealing)
    serializer.write_module(module)
    serializer.close()
    for path in model_dir.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    return directory, passphrase


def test_a_file_of_tensorizers_own_is_served_and_no_secret_shows(
    tmp_path: Path,
    foreign_bundle: tuple[Path, str],
    reference: list[tuple[str, list[float]]],
) -> None:
    """Equal answers; flags from the command line win; every other secret is a canary too."""
    directory, passphrase = foreign_bundle
    values = {
        "TENSORSERVE_PASSPHRASE": passphrase,
        "AWS_ACCESS_KEY_ID": "canary-id-0123456789",
        "AWS_SECRET_ACCESS_KEY": "canary-secret-0123456789",
        "AWS_SESSION_TOKEN": "canary-token-0123456789",
    }
    environ = {"TENSORSERVE_MODEL_URI": str(directory)} | values
    with Tensorserve(tmp_path, environ, "--max-model-len", "256") as engine:
        engine.wait_ready()
        assert engine.completions("model", PROMPTS) == reference
        status, models = engine.get("/v1/models")
        assert status == 200
        assert json.loads(models)["data"][0]["max_model_len"] == 256
        canaries = Canaries({name: value.encode() for name, value in values.items()})
        metrics = engine.get("/metrics", engine.metrics_port)[1]
        assert found_secrets(engine, canaries, [metrics]) == {}
        assert engine.stop() == 143


def test_a_crashed_engine_is_started_again_as_often_as_asked(
    tmp_path: Path, bundle: Bundle
) -> None:
    """F13: once more here, then the container ends with the engine's code. The key by value is in
    no other process's environment."""
    environ = {
        "TENSORSERVE_MODEL_URI": str(bundle.directory),
        "TENSORSERVE_KEY": bundle.key.hex(),
        "TENSORSERVE_ENGINE_RESTARTS": "1",
    }
    with Tensorserve(tmp_path, environ) as engine:
        assert engine.process is not None
        for attempt in range(2):

            def importing(number: int = attempt) -> bool:
                begun = [e for e in engine.events() if e.get("phase") == "import"]
                return len(begun) > number and process_of(engine, "vllm") is not None

            engine.wait_for(importing, 60)
            shown = engine.log.read_bytes()
            for pid in session_processes(engine.process.pid):
                names = ("cmdline", *(("environ",) if pid != engine.process.pid else ()))
                for name in names:
                    with suppress(FileNotFoundError, ProcessLookupError):
                        shown += Path(f"/proc/{pid}/{name}").read_bytes()
            assert bundle.key.hex().encode() not in shown
            kill(process_of(engine, "vllm"))
        assert engine.process.wait(120) == 128 + signal.SIGKILL, engine.text[-4000:]
        assert [e["attempt"] for e in engine.events() if e["event"] == "start"] == [0, 1]
        assert session_processes(engine.process.pid) == []


# Without an engine ------------------------------------------------------------------------------


def test_every_tensor_through_every_source_is_bit_identical(
    s3: S3Server, s3_uri: str, bundle: Bundle, model_dir: Path
) -> None:
    """S3, HTTP and disk give the source model's bytes."""
    from safetensors import safe_open

    key = parse_key(Secret(bundle.key))
    manifest = read_manifest(str(bundle.directory), Access(), key)
    assert manifest is not None
    digests = manifest.tensors_files["model.tensors"].digests
    assert digests is not None
    access = Access(s3=s3_access(s3))
    with RangeServer(bundle.directory) as server:
        uris = [s3_uri, server.url, str(bundle.directory)]
        sources = [open_source(f"{uri}/model.tensors", access) for uri in uris]
        indexes = [read_index(source) for source in sources]
        with safe_open(model_dir / "model.safetensors", "pt") as original:
            names = set(original.keys())
            for index in indexes:
                assert {record.name for record in index.tensors} == names
            for *records, digest in zip(*(i.tensors for i in indexes), digests, strict=True):
                wanted = original.get_tensor(records[0].name)
                wanted_bytes = wanted.view(-1).view(dtype=_uint8()).numpy().tobytes()
                for source, record, index in zip(sources, records, indexes, strict=True):
                    assert record.shape == tuple(wanted.shape)
                    found = read_tensor(source, record, index, key, expected=digest)
                    assert bytes(found) == wanted_bytes


def _uint8() -> Any:
    import torch

    return torch.uint8


def test_a_load_leaves_no_thread_of_ours_behind() -> None:
    """The tests above ran sources in this process too."""
    assert not [t for t in threading.enumerate() if t.name.startswith("tensorserve")]
