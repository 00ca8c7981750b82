"""The fuzzer's seeds, and what it found before, end as they should; and it would tell a finding."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
sys.path[:0] = [str(FUZZ)]

from targets import TARGETS  # noqa: E402

from fuzz import mutated, run, seeds_of  # noqa: E402

REFUSED_BY_NAME = {
    "manifest": b'{"format": "tensorserve-bundle", "version": ' + b"9" * 4400 + b"}",
    "json": b"[" * 100_000,
    "safetensors": b'{"t": {"dtype": "U8", "shape": ['
    + b"9" * 4400
    + b'], "data_offsets": [0, 1]}}',
    "uri": b"https://user:CANARY@[::1/m",
    "settings": b"TENSORSERVE_PORT=" + b"9" * 4400,
    "name": b"%252e%252e/x",
    "signature": b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": '
    + b"[" * 5_000,
    "answer": b'HTTP/1.1 206\nContent-Range: bytes 5-14/100\nETag: "a"\nContent-Length: '
    + b"9" * 4400
    + b"\n\n",
}


@pytest.mark.parametrize("target", TARGETS)
def test_each_seed_ends_as_it_should(target: str) -> None:
    """Good ones are accepted, else mutations of them would not come far."""
    outcomes = [TARGETS[target](seed) for seed in seeds_of(target)]
    assert "accepted" in outcomes
    assert sum(len(seed) for seed in seeds_of(target)) < 20_000, "git has to carry them"


@pytest.mark.parametrize("target", TARGETS)
def test_what_once_ended_with_a_traceback_is_refused(target: str) -> None:
    """Long numbers, deep nesting, half an IPv6 address."""
    assert TARGETS[target](REFUSED_BY_NAME[target]) == "refused"


@pytest.mark.parametrize(
    ("environ", "code"),
    [
        ({"TENSORSERVE_MODEL_URI": "https://user:PW@["}, 78),
        ({"TENSORSERVE_MODEL_URI": "https://[/m"}, 78),
        ({"TENSORSERVE_MODEL_URI": "s3://b/%03d%03d.tensors"}, 78),
        ({"TENSORSERVE_MODEL_URI": "/m\nTENSORSERVE"}, 78),
        ({"TENSORSERVE_PORT": "9" * 4400}, 78),
        ({"TENSORSERVE_HOST_MEMORY_LIMIT": "9" * 400 + "T"}, 78),
        ({"TENSORSERVE_FETCH_CONNECTIONS": "9" * 4400}, 78),
        ({"TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": "1000000000"}, 78),
        ({"TENSORSERVE_VLLM_MAX_MODEL_LEN": "9" * 4400}, 78),
        ({"AWS_ENDPOINT_URL_S3": "http://["}, 78),
        ({"TENSORSERVE_MODEL_NAME": b"\xff\xfe".decode(errors="surrogateescape")}, 78),
        ({"VLLM_API_KEY": b"\xff\xfe".decode(errors="surrogateescape")}, 78),
        ({"TENSORSERVE_NO_SUCH_\udcff": "x"}, 78),
        ({"TENSORSERVE_MODEL_URI": b"/m\xc3\xbc".decode()}, 0),
    ],
)
def test_a_command_ends_with_the_reason_and_no_traceback(
    environ: dict[str, str], code: int, tmp_path: Path
) -> None:
    """78, never 70: through the real command."""
    base = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TENSORSERVE_MODEL_URI": "/m"}
    done = subprocess.run(
        [sys.executable, "-m", "tensorserve.cli", "plan"],
        env=base | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "PW" not in done.stderr + done.stdout
    assert len(done.stderr) < 1500


@pytest.mark.parametrize("uri", ["https://u:PW@[", "https://u:PW@[::1/m", "file://u:PW@h/x"])
def test_a_command_that_names_its_own_uri_does_so_too(uri: str, tmp_path: Path) -> None:
    """`verify` takes any text."""
    done = subprocess.run(
        [sys.executable, "-m", "tensorserve.cli", "verify", uri],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    assert "Traceback" not in done.stderr
    assert "PW" not in done.stderr + done.stdout


def test_the_same_seed_gives_the_same_inputs() -> None:
    """So that a finding can be had again."""
    seeds = seeds_of("uri")
    first, again = ([mutated(seeds[0], seeds, random.Random(7)) for _ in range(50)] for _ in "ab")
    assert first == again


def test_a_finding_ends_the_run_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a minute of it in CI would show nothing."""
    monkeypatch.setattr("fuzz.FOUND", tmp_path)

    def fragile(data: bytes) -> str:
        if b"[" in data:
            raise ZeroDivisionError
        return "accepted"

    _, clean = run({"uri": fragile}, seed=1, most=100_000, seconds=None)
    assert not clean
    assert b"[" in next(tmp_path.iterdir()).read_bytes()
    assert "ZeroDivisionError" in capsys.readouterr().err
