"""How long a stop may take, from the inside out."""

from __future__ import annotations

from configparser import ConfigParser

import pytest

from tensorserve.config.vllm_options import MOST_DRAIN_SECONDS
from tensorserve.launch.stopping import engine_seconds, supervisor_seconds
from tensorserve.launch.supervisor import supervisord_conf

DOCKER_WAITS = 10.0


@pytest.mark.parametrize("serving", [True, False])
def test_each_process_has_longer_than_what_it_waits_for(serving: bool) -> None:
    """Or a process would be killed while it still ends its children in order."""
    assert engine_seconds(60, serving=serving) < supervisor_seconds(60, serving=serving)


def test_running_requests_have_the_whole_time_to_drain() -> None:
    """--shutdown-timeout is vLLM's; while it loads there are no requests."""
    assert engine_seconds(60, serving=True) > 60
    assert engine_seconds(60, serving=False) == engine_seconds(0, serving=False)


def test_without_a_time_to_drain_docker_kills_nothing() -> None:
    """`docker stop` waits for 10 s."""
    assert supervisor_seconds(0, serving=True) < DOCKER_WAITS
    assert supervisor_seconds(0, serving=False) < 5


def test_supervisord_cuts_no_drain_that_is_accepted() -> None:
    """It kills the engine's parent, and vLLM with it, after a time of its own."""
    conf = ConfigParser(interpolation=None)
    conf.read(supervisord_conf())
    waits = conf.getint("program:engine", "stopwaitsecs")
    assert waits > engine_seconds(MOST_DRAIN_SECONDS, serving=True)
