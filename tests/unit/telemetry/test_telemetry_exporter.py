"""Does the exporter tell Prometheus, Kubernetes and a browser the truth over a real socket?"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse
from s3server import free_ports

from telemetry_starts import (
    Client,
    Engine,
    begin_start,
    exporting,
    log_load,
    log_start,
    write_line,
)
from tensorserve.errors import ConfigurationError
from tensorserve.launch.companions import (
    COMPANIONS_VARIABLE,
    CompanionContext,
    publish_companions,
)
from tensorserve.telemetry import Edge, Phase, events_path, read_events
from tensorserve.telemetry.event_codec import Record
from tensorserve.telemetry.exporter import Exporter
from tensorserve.telemetry.schema import (
    AdaptersCounted,
    CompiledCacheKnown,
    EngineExited,
    EngineReady,
    Event,
    LoadDone,
    LoadPlanned,
    PhaseChanged,
    StartFailed,
    VerificationKnown,
)
from waiting import wait_for

# The design's list, which dashboards and alerts depend on.
METRICS = {
    "tensorserve_build_info": {"version", "vllm_version", "tensorizer_version"},
    "tensorserve_phase_duration_seconds": {"phase"},
    "tensorserve_startup_seconds": set(),
    "tensorserve_ready": set(),
    "tensorserve_load_info": {"rank", "loader", "transport", "sharing"},
    "tensorserve_verification": {"mode"},
    "tensorserve_compiled_cache": {"result"},
    "tensorserve_load_size_bytes": {"rank"},
    "tensorserve_load_bytes_total": {"rank", "stage"},
    "tensorserve_load_stage_seconds_total": {"rank", "stage"},
    "tensorserve_load_progress_ratio": {"rank"},
    "tensorserve_load_throughput_bytes_per_second": {"rank"},
    "tensorserve_fetch_requests_total": set(),
    "tensorserve_fetch_retries_total": {"reason"},
    "tensorserve_failures_total": {"reason"},
    "tensorserve_adapter_loads_total": set(),
    "tensorserve_adapter_load_seconds_total": set(),
    "tensorserve_adapter_hits_total": set(),
    "tensorserve_adapter_failures_total": {"reason"},
    "tensorserve_adapter_ends_total": {"reason"},
    "tensorserve_adapters": set(),
    "tensorserve_adapters_held_bytes": set(),
}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        yield engine


def samples(client: Client) -> dict[tuple[str, tuple[str, ...]], float]:
    """{(name, label values): value} of one scrape."""
    families = parse(client.ask("/metrics")[2])
    return {
        (s.name, tuple(s.labels[k] for k in sorted(s.labels))): s.value
        for family in families
        for s in family.samples
    }


def logged(state_dir: Path, kind: type[Event]) -> list[Record]:
    """The events of a kind in the log, oldest first."""
    return [r for r in read_events(events_path(state_dir)) if isinstance(r.event, kind)]


def ready_events(state_dir: Path) -> int:
    return len(logged(state_dir, EngineReady))


def test_every_metric_of_the_design_is_there(tmp_path: Path, engine: Engine) -> None:
    """Names and labels are a contract."""
    log = log_start(tmp_path, engine)
    log_load(log, copied=400, done=False)
    log.emit(VerificationKnown("manifest"))
    log.emit(CompiledCacheKnown("absent", "5e" * 32))
    log.emit(AdaptersCounted(1, 1.0, 1, {"corrupt": 1}, {"removed": 1}, 1, 1))
    log.emit(StartFailed("corrupt", 65, "m"))
    with exporting(tmp_path) as client:
        families = list(parse(client.ask("/metrics")[2]))
    found = {s.name: set(s.labels) for family in families for s in family.samples}
    assert found == METRICS


@pytest.mark.parametrize(("compiled_anew", "result"), [(False, "brought"), (True, "unused")])
def test_compiled_code_without_use_is_told(
    tmp_path: Path, engine: Engine, compiled_anew: bool, result: str
) -> None:
    """When the start is ready, vLLM has a key more than the bundle brought it."""
    keys = tmp_path / "vllm/torch_compile_cache/torch_aot_compile"
    (keys / "of the bundle").mkdir(parents=True)
    engine.status = 200
    log = log_start(tmp_path, engine)
    log.emit(CompiledCacheKnown("brought", "5e" * 32, str(tmp_path / "vllm"), 1))
    if compiled_anew:
        (keys / "another").mkdir()
    log_load(log, copied=1000, done=True)
    with exporting(tmp_path) as client:
        wait_for(lambda: ready_events(tmp_path), 20)
        wait_for(lambda: ("tensorserve_compiled_cache", (result,)) in samples(client), 20)
        found = {name for name in samples(client) if name[0] == "tensorserve_compiled_cache"}
    assert found == {("tensorserve_compiled_cache", (result,))}
    assert len(logged(tmp_path, CompiledCacheKnown)) == 1 + compiled_anew


def test_the_documentation_names_every_metric() -> None:
    """docs/metrics.md is what users read."""
    text = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    assert [name for name in METRICS if f"`{name}" not in text] == []


def test_a_scrape_during_a_load_shows_partial_progress(tmp_path: Path, engine: Engine) -> None:
    """Nobody else shows it while it happens."""
    log_load(log_start(tmp_path, engine), copied=400, done=False)
    with exporting(tmp_path) as client:
        found = samples(client)
    assert found["tensorserve_load_progress_ratio", ("0",)] == 0.4
    assert found["tensorserve_load_size_bytes", ("0",)] == 1000
    assert found["tensorserve_load_bytes_total", ("0", "decrypt")] == 400
    assert found["tensorserve_load_stage_seconds_total", ("0", "fetch")] == 1.0
    assert found["tensorserve_load_throughput_bytes_per_second", ("0",)] > 0
    assert found["tensorserve_fetch_requests_total", ()] == 7
    assert found["tensorserve_fetch_retries_total", ("reset",)] == 2
    assert found["tensorserve_ready", ()] == 0


def test_a_scrape_says_which_loader_reads(tmp_path: Path, engine: Engine) -> None:
    """`auto`, also where a log of an earlier version does not say."""
    log = log_start(tmp_path, engine)
    write_line(tmp_path, "load_plan", rank=0, bytes=10, tensors=1)
    log.emit(LoadPlanned(1, 10, 1, "reference", "libcurl"))
    log.emit(LoadPlanned(2, 10, 1, "s3://Someone's", "urllib3"))
    with exporting(tmp_path) as client:
        found = samples(client)
    said = (("auto", "0"), ("reference", "1", "libcurl"), ("other", "2", "urllib3"))
    assert all(found["tensorserve_load_info", labels] == 1 for labels in said)


def test_each_scrape_sees_the_log_as_it_stands(tmp_path: Path, engine: Engine) -> None:
    """No scrape waits for a poll."""
    log = log_start(tmp_path, engine)
    with exporting(tmp_path) as client:
        for copied in (100, 200, 300):
            log_load(log, copied=copied, done=False)
            assert samples(client)["tensorserve_load_bytes_total", ("0", "copy")] == copied


def test_the_phases_of_one_scrape_sum_to_the_start(tmp_path: Path, engine: Engine) -> None:
    """Also once the exporter itself has announced the end of the warm-up."""
    engine.status = 200
    log_load(log_start(tmp_path, engine), copied=1000, done=True)
    with exporting(tmp_path) as client:
        wait_for(lambda: client.status("/readyz") == 200 and ready_events(tmp_path) == 1)
        found = samples(client)
    phases = [v for (name, _), v in found.items() if name == "tensorserve_phase_duration_seconds"]
    assert math.isclose(
        sum(phases), found["tensorserve_startup_seconds", ()], rel_tol=0, abs_tol=1e-6
    )


def test_ready_needs_every_ranks_load_and_an_answering_engine(
    tmp_path: Path, engine: Engine
) -> None:
    """/readyz follows: loading, rank 1 still loading, engine silent, ready."""
    log = log_start(tmp_path, engine)
    with exporting(tmp_path) as client:
        assert (client.status("/livez"), client.status("/readyz")) == (200, 503)
        log_load(log, copied=400, done=False, rank=1)
        log_load(log, copied=1000, done=True, rank=0)
        engine.status = 200
        assert json.loads(client.ask("/readyz")[2])["reason"] == "still loading: rank 1"
        engine.status = 503
        log.emit(LoadDone(1))
        wait_for(lambda: engine.asked > 1)
        status, _, body = client.ask("/readyz")
        assert (status, json.loads(body)["ready"]) == (503, False)
        assert "/health" in json.loads(body)["reason"]
        engine.status = 200
        wait_for(lambda: client.status("/readyz") == 200)
        assert samples(client)["tensorserve_ready", ()] == 1


def test_the_engines_port_is_not_asked_before_the_load_is_done(
    tmp_path: Path, engine: Engine
) -> None:
    """A 200 from whoever it is must not make a start ready."""
    engine.status = 200
    log = log_start(tmp_path, engine)
    with exporting(tmp_path) as client:
        log_load(log, copied=400, done=False)
        assert client.status("/readyz") == 503
        log.emit(LoadDone(0))
        wait_for(lambda: client.status("/readyz") == 200)
        assert logged(tmp_path, EngineReady)[0].t > logged(tmp_path, LoadDone)[0].t


@pytest.mark.parametrize("status", [204, 302, 404, 500])
def test_only_200_is_healthy(tmp_path: Path, engine: Engine, status: int) -> None:
    """Neither a redirect nor any other answer is."""
    engine.status = status
    log_load(log_start(tmp_path, engine), copied=1000, done=True)
    with exporting(tmp_path) as client:
        wait_for(lambda: engine.asked > 1)
        assert client.status("/readyz") == 503
    assert ready_events(tmp_path) == 0


def test_ready_is_announced_once_across_exporter_restarts(tmp_path: Path, engine: Engine) -> None:
    """The second one finds the event in the log and still says ready."""
    engine.status = 200
    log_load(log_start(tmp_path, engine), copied=1000, done=True)
    for _ in range(2):
        with exporting(tmp_path) as client:
            wait_for(lambda: client.status("/readyz") == 200)
    assert ready_events(tmp_path) == 1
    phases = [record.event for record in logged(tmp_path, PhaseChanged)]
    assert phases.count(PhaseChanged(Phase.WARMUP, Edge.END)) == 1
    assert phases[-1] == PhaseChanged(Phase.WARMUP, Edge.END)


def test_a_second_start_in_the_same_log_is_announced_again(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt becomes ready by itself, and is not ready before."""
    monkeypatch.setattr("tensorserve.telemetry.readiness.SECONDS_BETWEEN_PROBES_READY", 0.05)
    engine.status = 200
    log = log_start(tmp_path, engine)
    log_load(log, copied=1000, done=True)
    with exporting(tmp_path) as client:
        wait_for(lambda: client.status("/readyz") == 200)
        log.emit(EngineExited(1))
        assert client.status("/readyz") == 503
        begin_start(log, "b", engine.url)
        assert client.status("/readyz") == 503
        log_load(log, copied=1000, done=True)
        wait_for(lambda: client.status("/readyz") == 200)
        assert samples(client)["tensorserve_failures_total", ("engine",)] == 1
    assert ready_events(tmp_path) == 2


def test_an_engine_that_stops_answering_is_not_ready(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked again every few seconds (shortened here), and back once it answers."""
    monkeypatch.setattr("tensorserve.telemetry.readiness.SECONDS_BETWEEN_PROBES_READY", 0.05)
    engine.status = 200
    log_load(log_start(tmp_path, engine), copied=1000, done=True)
    with exporting(tmp_path) as client:
        wait_for(lambda: client.status("/readyz") == 200)
        engine.status = 503
        wait_for(lambda: client.status("/readyz") == 503)
        assert samples(client)["tensorserve_ready", ()] == 0
        engine.status = 200
        wait_for(lambda: client.status("/readyz") == 200)
    assert ready_events(tmp_path) == 1


def test_a_start_that_failed_is_never_ready(tmp_path: Path, engine: Engine) -> None:
    """Even if the engine's server answers while it goes down."""
    engine.status = 200
    log = log_start(tmp_path, engine)
    log_load(log, copied=1000, done=True)
    log.emit(StartFailed("corrupt", 65, "canary"))
    with exporting(tmp_path) as client:
        status, _, body = client.ask("/readyz")
    assert (status, engine.asked) == (503, 0)
    assert json.loads(body)["reason"] == "the start failed: corrupt (exit code 65)"


def test_a_self_signed_engine_is_healthy(tmp_path: Path, engine: Engine) -> None:
    """vLLM with --ssl-certfile answers on loopback with a certificate for another name."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout k.pem -out c.pem -subj /CN=x"
    subprocess.run(command.split(), check=True, capture_output=True, cwd=tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
    engine.server.socket = context.wrap_socket(engine.server.socket, server_side=True)
    engine.url, engine.status = engine.url.replace("http:", "https:"), 200
    log_load(log_start(tmp_path, engine), copied=1000, done=True)
    with exporting(tmp_path) as client:
        wait_for(lambda: client.status("/readyz") == 200)


def test_startupz_tells_what_a_progress_bar_needs(tmp_path: Path, engine: Engine) -> None:
    """503 with the numbers while starting, 200 with the same once ready."""
    log = log_start(tmp_path, engine)
    log_load(log, copied=400, done=False)
    with exporting(tmp_path) as client:
        status, _, body = client.ask("/startupz")
        content = json.loads(body)
        assert (status, content["phase"], content["ready"]) == (503, "load", False)
        assert (content["progress"], content["bytes"], content["total_bytes"]) == (0.4, 400, 1000)
        assert content["rate"] > 0
        assert content["eta"] >= 0
        assert content["last_advance"] >= 0
        assert content["failures"] == {}
        assert list(content["phases"]) == ["load"]
        log.emit(LoadDone(0))
        engine.status = 200
        wait_for(lambda: client.status("/startupz") == 200)
        content = json.loads(client.ask("/startupz")[2])
        assert (content["ready"], content["reason"], content["eta"]) == (True, None, 0)


def test_before_any_start_the_exporter_answers_already(tmp_path: Path) -> None:
    """From the first second: alive, not ready, scrapeable."""
    with exporting(tmp_path) as client:
        assert (client.status("/livez"), client.status("/readyz")) == (200, 503)
        assert samples(client)["tensorserve_ready", ()] == 0
        assert json.loads(client.ask("/startupz")[2])["phase"] == "waiting"


def test_nothing_of_the_users_is_shown(tmp_path: Path, engine: Engine) -> None:
    """Messages, odd reasons and phases from the log reach no answer, no label, no page."""
    log = log_start(tmp_path, engine)
    write_line(tmp_path, "phase", phase="s3://canary/<b>", state="begin")
    log_load(log, copied=400, done=False)
    write_line(tmp_path, "load_progress", rank=0, fetch=500, retries={"s3://canary": 1})
    log.emit(StartFailed("s3://canary", 65, "s3://canary/model is damaged"))
    with exporting(tmp_path) as client:
        answers = [client.ask(p)[2] for p in ("/", "/metrics", "/readyz", "/startupz", "/canary")]
        found = samples(client)
    assert not any("canary" in answer for answer in answers)
    assert found["tensorserve_failures_total", ("other",)] == 1
    assert found["tensorserve_fetch_retries_total", ("other",)] == 1


def test_openmetrics_is_given_to_whom_asks_for_it(tmp_path: Path, engine: Engine) -> None:
    """Prometheus negotiates the format."""
    log_load(log_start(tmp_path, engine), copied=400, done=False)
    with exporting(tmp_path) as client:
        _, headers, body = client.ask("/metrics", accept="application/openmetrics-text")
        assert client.ask("/metrics")[1]["Content-Type"].startswith("text/plain; version=0.0.4")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert "tensorserve_load_bytes" in {family.name for family in parse_openmetrics(body)}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_mend(tmp_path: Path, engine: Engine) -> None:
    """Help texts, units and names are as Prometheus wants them."""
    log = log_start(tmp_path, engine)
    log_load(log, copied=400, done=False)
    log.emit(StartFailed("corrupt", 65, "m"))
    with exporting(tmp_path) as client:
        text = client.ask("/metrics")[2]
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    """It works in a closed network; the policy forbids the rest."""
    with exporting(tmp_path) as client:
        status, headers, body = client.ask("/")
    assert status == 200
    assert not any(word in body for word in ("src=", "href=", "//"))
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_only_get_and_head_are_answered(tmp_path: Path) -> None:
    """Nothing can be changed from outside; unknown paths are 404."""
    with exporting(tmp_path) as client:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            status, headers, _ = client.ask("/metrics", method)
            assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert client.ask("/metrics", "HEAD")[0] == 200
        assert client.ask("/metrics", "HEAD")[2] == ""
        assert client.status("/../etc/passwd") == 404


def slow_sockets(port: int, count: int) -> list[socket.socket]:
    """Connections that have begun a request and do not end it; every third one says nothing."""
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for number, connection in enumerate(slow):
        if number % 3:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost:")
    return slow


def readable(connections: list[socket.socket]) -> list[tuple[int, int]]:
    """Not by select(): it knows no descriptor above 1023, and a long test run has more."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    return poll.poll(0)


@contextmanager
def separate_exporter(state_dir: Path, log: Path) -> Iterator[Client]:
    """`tensorserve exporter`, as supervisord runs it; what it prints goes to `log`."""
    (port,) = free_ports(1)
    companions = CompanionContext(state_dir, "127.0.0.1", port, engine_restarts=0, failure_linger=0)
    environment = {**os.environ, COMPANIONS_VARIABLE: publish_companions(companions)}
    command = [sys.executable, "-m", "tensorserve.cli", "exporter"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    client = Client(SimpleNamespace(port=port))
    try:
        wait_for(lambda: answers(client))
        yield client
    finally:
        process.kill()
        process.wait()


def answers(client: Client) -> bool:
    try:
        return client.status("/livez") == 200
    except OSError:
        return False


def test_probes_are_answered_beside_500_slow_sockets(tmp_path: Path) -> None:
    """Kubernetes would kill a healthy pod whose probes wait."""
    with separate_exporter(tmp_path, tmp_path / "log") as client:
        slow = slow_sockets(client.port, 500)
        try:
            for _ in range(5):
                assert (client.status("/livez"), client.status("/readyz")) == (200, 503)
                assert client.status("/metrics") == 200
            # They were kept: nobody who is only slow has been turned away.
            assert readable(slow) == []
        finally:
            for connection in slow:
                connection.close()
    assert (tmp_path / "log").read_text() == ""


def test_the_oldest_connection_of_the_greediest_peer_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood closes its own connections, and neither the others' nor new ones."""
    monkeypatch.setattr("tensorserve.telemetry.http_server.MOST_CONNECTIONS", 12)
    with exporting(tmp_path) as client:
        other = socket.create_connection(
            ("127.0.0.1", client.port), source_address=("127.0.0.2", 0)
        )
        flood = slow_sockets(client.port, 40)
        wait_for(lambda: len(readable(flood)) == 40 - 11)
        assert client.status("/livez") == 200
        other.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert other.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
        for connection in (other, *flood):
            connection.close()


def test_a_connection_has_an_absolute_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then does not make it longer."""
    monkeypatch.setattr("tensorserve.telemetry.http_server.SECONDS", 0.3)
    with (
        exporting(tmp_path) as client,
        socket.create_connection(("127.0.0.1", client.port)) as slow,
    ):
        slow.settimeout(0.02)

        def closed() -> bool:
            try:
                slow.send(b"G")
                return slow.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        wait_for(closed)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\xfc\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET /" + b"x" * 4000 + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 40000, 431),
    ],
)
def test_a_malformed_request_writes_at_most_one_short_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], sent: bytes, status: int
) -> None:
    """Whatever comes, and however often: no traceback, nothing of what was sent."""
    with exporting(tmp_path) as client:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", client.port)) as odd:
                odd.settimeout(10)
                odd.sendall(sent)
                answer = odd.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 %d " % status)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == (status >= 400)
    assert "Traceback" not in printed.err
    assert len(printed.err) < 120


def test_a_port_in_use_is_a_clear_error(tmp_path: Path, engine: Engine) -> None:
    """It names the port and the variable to change."""
    with pytest.raises(ConfigurationError, match=str(engine.server.server_port)) as caught:
        Exporter(tmp_path, "127.0.0.1", engine.server.server_port)
    assert "TENSORSERVE_METRICS_PORT" in str(caught.value)


def test_the_exporter_imports_nothing_heavy() -> None:
    """It must answer in the container's first second, before vLLM's imports have begun."""
    code = (
        "import sys, tensorserve.telemetry.exporter\n"
        "heavy = {'torch', 'boto3', 'botocore', 'vllm', 'numpy', 'tensorizer', 'transformers'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
