"""compose.yaml's profile `vault`, as a user runs it: wrapped, served, rotated, and served again."""

from __future__ import annotations

import os

import pytest
from containers import complaints, needs_podman
from running import request
from stack import Stack, ask

pytestmark = [
    needs_podman,
    pytest.mark.skipif("TEST_BRIEF" in os.environ, reason="TEST_BRIEF: make test-image runs it"),
]


def test_the_vault_profile_serves_before_and_after_a_rotation() -> None:
    """docs/compose.md's three commands; a real OpenBao unwraps the key, in two versions."""
    with Stack("vault", ("pack-vault", "s3", "vault")) as stack:

        def ready() -> bool:
            assert stack.state("demo-vault", "Running") == "true", stack.log("demo-vault")
            return request(f"http://127.0.0.1:{stack.metrics}/readyz")[0] == 200

        stack.wait(ready, "the first start", 240)
        first = ask(stack)
        assert "Paris" in first
        stack.compose("run", "--rm", "rotate", also=("rotate",))
        starts = stack.log("demo-vault").count("Application startup complete")
        stack.compose("restart", "demo-vault")
        stack.wait(
            lambda: stack.log("demo-vault").count("Application startup complete") > starts,
            "the second start",
            240,
        )
        stack.wait(ready, "the second start to be ready", 60)
        assert ask(stack) == first
        assert complaints(stack.log("demo-vault")) == []
