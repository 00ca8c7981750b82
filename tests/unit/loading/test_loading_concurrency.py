"""The number of connections finds what the link gives, on links that are written down here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from tensorserve.loading.concurrency import Concurrency, prefetch_start, remote_start

MB = 1e6


class Link:
    """A link whose rate depends on the number of connections; its own clock."""

    def __init__(self, rate: Callable[[int], float]) -> None:
        self.rate = rate
        self.now = 0.0
        self.bytes = 0.0
        self.connections = Concurrency(16, 256, lambda: int(self.bytes), clock=lambda: self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            pause = self.connections.step()
            assert pause > 0
            self.now += pause
            self.bytes += pause * self.rate(self.connections.target)


@pytest.mark.parametrize(
    ("rate", "least", "most"),
    [
        pytest.param(lambda n: min(n * 10, 470) * MB, 32, 128, id="a limit per connection"),
        pytest.param(lambda n: n * 10 * MB, 256, 256, id="only a limit per connection"),
        pytest.param(lambda _: 900 * MB, 16, 32, id="one connection is enough"),
        pytest.param(lambda n: (1000 if n <= 16 else 500) * MB, 16, 32, id="too many hurt"),
    ],
)
def test_it_finds_what_helps(rate: Callable[[int], float], least: int, most: int) -> None:
    """Within two seconds, and it stays there."""
    link = Link(rate)
    link.run(2)
    assert least <= link.connections.target <= most
    visited = []
    for _ in range(40):
        link.run(0.1)
        visited.append(link.connections.target)
    assert sum(least <= n <= most for n in visited) > 30


def test_it_follows_a_link_that_becomes_faster() -> None:
    """A step is tried again every few seconds."""
    link = Link(lambda _: 100 * MB)
    link.run(2)
    assert link.connections.target <= 32
    link.rate = lambda n: n * 10 * MB
    link.run(30)
    assert link.connections.target == 256


def test_a_server_that_warms_up_does_not_drive_it_too_high() -> None:
    """The rate grows by itself for a while after each step; 64 connections fill this link."""
    link = Link(lambda n: min(n * 10, 470) * MB * (1 - math.exp(-link.now / 0.5)))
    link.run(2.5)
    assert link.connections.target == 64
    visited = []
    for _ in range(20):
        link.run(0.1)
        visited.append(link.connections.target)
    assert visited.count(64) >= 15


def test_it_climbs_at_once_where_the_rate_falls() -> None:
    """What was fetched ahead came from memory; then the network's own limits begin to count."""
    link = Link(lambda _: 2000 * MB)
    link.run(2)
    assert link.connections.target <= 32
    link.rate = lambda n: min(n * 10, 600) * MB
    link.run(1.5)
    assert 48 <= link.connections.target <= 128


def test_it_is_quick_where_the_link_is() -> None:
    """Four times as many connections after some 200 ms, on a link that answers in 20."""
    link = Link(lambda n: n * 10 * MB)
    link.run(0.02)
    link.run(0.2)
    assert link.connections.target == 64


def test_a_consumer_that_takes_nothing_is_no_slow_link() -> None:
    """While nothing moves, nothing is learnt from it."""
    link = Link(lambda _: 900 * MB)
    link.run(2)
    before = link.connections.target
    link.rate = lambda _: 0.0
    link.run(2)
    assert link.connections.target <= max(32, before)


def test_without_processor_time_to_spare_it_takes_no_step() -> None:
    """More connections would only cost more of it; where there is time again, they are tried."""
    link = Link(lambda n: n * 10 * MB)
    spare = 0.03
    link.connections = Concurrency(
        16, 256, lambda: int(link.bytes), clock=lambda: link.now, idle=lambda: spare
    )
    link.run(10)
    assert link.connections.target == 16
    spare = 0.6
    link.run(10)
    assert link.connections.target == 256


@pytest.mark.parametrize(
    ("spare", "expected"),
    [
        pytest.param(0.9, 64, id="idle: a slow link, or one that wants many"),
        pytest.param(0.3, 8, id="half used: a step by two"),
        pytest.param(0.0, 4, id="used up: loopback"),
    ],
)
def test_the_first_step_goes_as_far_as_the_processors_allow(spare: float, expected: int) -> None:
    """After a quarter of a second, on a link that answers in 20 ms."""
    link = Link(lambda n: n * 10 * MB)
    link.connections = Concurrency(
        4, 256, lambda: int(link.bytes), clock=lambda: link.now, idle=lambda: spare
    )
    link.run(0.02)
    link.run(0.2)
    assert link.connections.target == expected


def test_where_the_link_is_full_a_wide_step_is_taken_back() -> None:
    """Idle processors, and yet more connections bring nothing."""
    link = Link(lambda _: 100 * MB)
    link.connections = Concurrency(4, 256, lambda: int(link.bytes), clock=lambda: link.now)
    link.run(3)
    assert link.connections.target <= 8


@pytest.mark.parametrize(("processors", "expected"), [(1, 4), (2, 4), (4, 8), (8, 16), (96, 16)])
def test_few_processors_begin_with_few_connections(processors: int, expected: int) -> None:
    assert remote_start(processors) == expected


@pytest.mark.parametrize(("processors", "expected"), [(1, 2), (2, 2), (4, 3), (8, 7), (96, 16)])
def test_fetching_ahead_leaves_the_import_a_processor(processors: int, expected: int) -> None:
    assert prefetch_start(processors) == expected


def test_a_number_that_was_asked_for_is_kept() -> None:
    """TENSORSERVE_FETCH_CONNECTIONS."""
    connections = Concurrency(5, 5, lambda: 0)
    for _ in range(10):
        connections.step()
        assert connections.target == 5
