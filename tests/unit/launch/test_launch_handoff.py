"""The hand-over of secrets: in memory, read by other processes of ours, and by nobody else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tensorserve.errors import TensorserveError
from tensorserve.launch import handoff


def test_another_process_takes_over_what_was_published() -> None:
    """supervisord and `spawn` close descriptors; the path works all the same."""
    reference = handoff.publish_json({"key": "canary"})
    code = """import sys
from tensorserve.launch import handoff
print(handoff.receive_json(sys.argv[1]))"""
    done = subprocess.run(
        [sys.executable, "-c", code, reference], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "{'key': 'canary'}"


def test_what_was_published_cannot_be_changed() -> None:
    """A reader that could write would choose the key of all others."""
    reference = handoff.publish(b"canary")
    number = int(reference.rsplit("/", 1)[1])
    with pytest.raises(PermissionError):
        os.write(number, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(number, 0)


def test_another_user_cannot_read_it() -> None:
    """The kernel's own check, tried for real (as root, by becoming nobody)."""
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    reference = handoff.publish(b"canary")
    done = subprocess.run(["cat", reference], user=65534, capture_output=True, check=False)
    assert done.returncode != 0
    assert b"canary" not in done.stdout


def test_a_reference_that_is_gone_says_what_to_do() -> None:
    """The parent ended: start again."""
    with pytest.raises(TensorserveError, match="Start again"):
        handoff.receive_json("/proc/1/fd/987654")


def test_only_our_own_kind_of_reference_is_opened() -> None:
    """The variable must not become a way to read other files."""
    with pytest.raises(TensorserveError, match="not one of ours"):
        handoff.receive_json("/etc/passwd")
