"""Each command by its door: its options, what it prints, how its mistakes end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tensorserve.cli import main
from tensorserve.telemetry import Edge, EventLog, Phase, events_path
from tensorserve.telemetry.schema import PhaseChanged, StartBegan


def test_pack_needs_a_key_to_encrypt_with(capsys: pytest.CaptureFixture[str]) -> None:
    """And a key without `--encrypt` is a mistake, not a plain bundle."""
    assert main(["pack", "a", "b", "--encrypt"]) == 64
    assert main(["pack", "a", "b", "--key-file", "k"]) == 64
    assert "Add --encrypt" in capsys.readouterr().err


def test_precompile_takes_vllms_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `--`, as `up` does; without a URI it is misused."""
    assert main(["precompile"]) == 64
    called = []
    monkeypatch.setattr(
        "tensorserve.packing.precompile.precompile", lambda *a: called.append(a[:4]) or "made"
    )
    assert main(["precompile", "/models/m", "--sign-key", "k", "--", "--dtype", "half"]) == 0
    assert capsys.readouterr().out == "made\n"
    ((uri, environ, arguments, sign_key),) = called
    assert (uri, arguments, sign_key) == ("/models/m", ("--dtype", "half"), Path("k"))
    assert environ == dict(os.environ)


def test_pack_has_files_for_ranks_in_one_layout_only(capsys: pytest.CaptureFixture[str]) -> None:
    """The other holds the checkpoint, which fits any number of ranks as it is."""
    assert main(["pack", "a", "b", "--layout", "hf", "--tensor-parallel-size", "2"]) == 64
    assert "serves any size" in capsys.readouterr().err
    assert main(["pack", "a", "b", "--tensor-parallel-size", "0"]) == 64
    assert main(["pack", "a", "b", "--layout", "other"]) == 64


@pytest.mark.usefixtures("environ")
def test_plan_is_readable_by_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """And takes vLLM's arguments after `--`."""
    assert main(["plan", "--json", "--", "--max-model-len", "99"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["command"][-2:] == ["--port=8000", "--max-model-len=99"]
    assert plan["settings"]["TENSORSERVE_MODEL_URI"] == "/models/m"


def test_plan_reports_every_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 78, a message for each."""
    monkeypatch.delenv("TENSORSERVE_MODEL_URI", raising=False)
    monkeypatch.setenv("TENSORSERVE_PROT", "1")
    assert main(["plan"]) == 78
    said = capsys.readouterr().err
    assert said.count("tensorserve: error:") == 2
    assert "TENSORSERVE_PORT" in said


def test_report_without_a_start_says_where_it_looked(
    environ: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 78; with a start, the table."""
    assert main(["report"]) == 78
    assert str(environ) in capsys.readouterr().err
    log = EventLog(events_path(environ))
    log.emit(StartBegan("1", "0", attempt=0, health_url="", port=1, metrics_port=2))
    log.emit(PhaseChanged(Phase.PREFLIGHT, Edge.BEGIN))
    assert main(["report"]) == 0
    assert "preflight" in capsys.readouterr().out


def test_health_without_a_server_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's health check: 1, not a traceback."""
    monkeypatch.setenv("TENSORSERVE_METRICS_PORT", "1")
    assert main(["health"]) == 1


@pytest.mark.parametrize("uri", ["S3://bucket/m", "'s3://bucket/m'", " s3://bucket/m\r\n"])
@pytest.mark.parametrize("command", ["verify", "sign"])
def test_commands_read_uris_as_variables_are_read(
    command: str,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Scheme, quotes and white space."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "TENSORSERVE_FETCH_DEADLINE": "1",
        "TENSORSERVE_KEY": bytes(32).hex(),
    }.items():
        monkeypatch.setenv(name, value)
    assert main([command, uri]) == 69
    # The first file that each reads.
    first = {"verify": "manifest.json", "sign": "model.sig"}[command]
    assert f"s3://bucket/m/{first}: no connection" in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["", "s3://b/a\nb", "hf://a", "s3:/b", "http://h:99999/"])
@pytest.mark.parametrize("words", [["verify"], ["sign"], ["pack", "src"]])
def test_commands_refuse_what_is_no_uri(words: list[str], uri: str) -> None:
    """As a configuration that is wrong."""
    assert main([*words, uri]) == 78


@pytest.mark.parametrize("directory", ["x" * 5000, "/a\nb"])
def test_report_refuses_what_is_no_directory(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not Python's OSError."""
    monkeypatch.setenv("TENSORSERVE_STATE_DIR", directory)
    assert main(["report"]) == 78


def test_health_of_what_is_no_host_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not Python's UnicodeError."""
    monkeypatch.setenv("TENSORSERVE_METRICS_HOST", "a" * 70)
    assert main(["health"]) == 1


@pytest.mark.usefixtures("environ")
def test_plan_says_which_guard_is_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Perhaps a secret did not arrive."""
    monkeypatch.setenv("TENSORSERVE_VLLM_API_KEY", "")
    assert main(["plan"]) == 0
    assert "warning: TENSORSERVE_VLLM_API_KEY is set to nothing" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["engine", "exporter", "watch"])
def test_what_supervisord_runs_is_refused_alone(command: str) -> None:
    """Each needs what `up` leaves for it."""
    done = subprocess.run(
        [sys.executable, "-m", "tensorserve.cli", command],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 64
    assert done.stderr.startswith("tensorserve: error: Only `tensorserve up` runs this command.")
