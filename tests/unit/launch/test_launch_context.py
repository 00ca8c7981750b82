"""One start: parsed once, the same in every process, and secret where it has to be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tensorserve.config.access import access_for, key_for
from tensorserve.config.settings import Settings
from tensorserve.config.variables import HANDOFF_VARIABLE
from tensorserve.launch.companions import CompanionContext, publish_companions, receive_companions
from tensorserve.launch.context import (
    PackedDraft,
    Shard,
    Start,
    current_start,
    publish_start,
    receive_start,
)

KEY = bytes(range(32))
CANARIES = ("canary-api", "canary-id", "canary-secret", KEY.hex())


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A secret of each kind."""
    (tmp_path / "key").write_bytes(KEY)
    return {
        "TENSORSERVE_MODEL_URI": "s3://bucket/m",
        "TENSORSERVE_KEY_FILE": str(tmp_path / "key"),
        "TENSORSERVE_STATE_DIR": str(tmp_path),
        "TENSORSERVE_VLLM_MAX_MODEL_LEN": "512",
        "TENSORSERVE_VERIFY": "",
        "VLLM_API_KEY": "canary-api",
        "S3_ACCESS_KEY_ID": "canary-id",
        "S3_SECRET_ACCESS_KEY": "canary-secret",
        "PATH": "/bin",
    }


@pytest.fixture
def start(environ: dict[str, str]) -> Start:
    """With all that the checks find out."""
    found = current_start(environ, ("-tp", "2", "--shutdown-timeout=60"))
    shard = Shard("s3://bucket/m/model.tensors", '"etag"', 10, "a", {"vllm": "0.32.0", "ranks": 2})
    draft = PackedDraft("/run/draft", shard)
    return Start(found.settings, found.plan, (shard,), frozenset({0, 2}), "/proc/1/fd/3", draft)


def test_every_process_has_the_same_start(start: Start) -> None:
    """Settings, plan, shards and secrets, with where each of them came from."""
    again = receive_start(publish_start(start))
    assert again == start
    assert again.settings.warnings == start.settings.warnings != ()
    assert again.settings.key is not None
    assert again.settings.key.reveal() == KEY
    assert "TENSORSERVE_KEY_FILE=" in again.settings.key.origin
    assert again.plan.argv == start.plan.argv
    assert again.plan.options.drain_seconds == 60
    assert access_for(again.settings) == access_for(start.settings)


def test_a_child_reads_no_setting_from_its_environment(
    start: Start, environ: dict[str, str], tmp_path: Path
) -> None:
    """It may have other variables, and the key's file may be gone."""
    code = """import os
from tensorserve.launch.context import current_start
start = current_start(os.environ, ("--no-such-flag",))
print(start.settings.port, start.plan.tensor_parallel_size, start.settings.key.origin)"""
    reference = publish_start(start)
    (tmp_path / "key").unlink()
    others = {**environ, "TENSORSERVE_PORT": "1", "TENSORSERVE_NONE": "x"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**others, HANDOFF_VARIABLE: reference, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"8000 2 TENSORSERVE_KEY_FILE={tmp_path / 'key'}"


def test_no_secret_is_printed(start: Start) -> None:
    """Neither as a text, nor in what vLLM inherits and is called with."""
    shown = f"{start!r} {start.plan.argv} {start.plan.environment} {publish_start(start)}"
    for canary in CANARIES:
        assert canary not in shown


def test_what_stands_beside_the_engine_has_no_secret(start: Start) -> None:
    """Exporter and event listener are given no more than they need."""
    settings = start.settings
    companions = CompanionContext(
        settings.state_dir, settings.metrics_host, settings.metrics_port, 3, settings.failure_linger
    )
    reference = publish_companions(companions)
    assert receive_companions(reference) == companions
    data = Path(reference).read_text()
    for canary in CANARIES:
        assert canary not in data
    assert Settings.__name__ not in data


def test_a_passphrase_is_handed_over_as_it_was(tmp_path: Path) -> None:
    """Bytes that are not UTF-8, and spaces around it."""
    (tmp_path / "p").write_bytes(b" \xff words \n")
    environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_PASSPHRASE_FILE": str(tmp_path / "p")}
    again = receive_start(publish_start(current_start(environ, ())))
    assert again.settings.passphrase is not None
    assert again.settings.passphrase.reveal() == b" \xff words "
    assert key_for(again.settings) is not None
