"""F1–F4: what a connection to a real S3 server can do to a load, and the load does not mind."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from commands import command
from loading import Load, load
from proxy import Asked, FaultProxy
from stored import ATTEMPTS, BUCKET, IMPATIENT, MIB, POLICY, Stored, plain_bundle

from rangeserver import RangeServer
from tensorserve.errors import SourceUnavailableError
from tensorserve.sources import Access, RetryPolicy, list_names


def loaded(
    stored: Stored, proxy: FaultProxy, policy: RetryPolicy = POLICY, *, connections: int = 4
) -> Load:
    """Through the proxy, and the tensors are those that were packed."""
    access = stored.access(proxy.url, policy)
    done = load(stored.uri, access, stored.key, connections=connections)
    assert done.digests == stored.digests
    return done


def unavailable(
    stored: Stored, proxy: FaultProxy, policy: RetryPolicy = POLICY
) -> SourceUnavailableError:
    """The load ends with exit code 69, and gave out nothing that is wrong."""
    partial = Load()
    with pytest.raises(SourceUnavailableError) as caught:
        load(stored.uri, stored.access(proxy.url, policy), stored.key, partial)
    assert caught.value.exit_code == 69
    assert partial.digests.items() < stored.digests.items()
    return caught.value


def resumed(proxy: FaultProxy, broken: Asked, after: int) -> bool:
    """Whether the rest of a range, and no more, was asked for once it had brought `after` bytes."""
    return any(
        broken.first < later.first <= broken.first + after and later.last == broken.last
        for later in proxy.requests[broken.number + 1 :]
    )


def stalls(done: Load) -> int:
    """How many there were, and nothing else; a busy machine may add to them."""
    assert done.retries.keys() == {"stall"}
    return done.retries["stall"]


def test_without_faults_nothing_is_retried(stored: Stored, proxy: FaultProxy) -> None:
    """What the other tests compare with: the proxy itself does no harm."""
    assert loaded(stored, proxy).retries == {}
    assert not proxy.fired


# F1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "reason"), [("reset", "reset"), ("short", "short_body")])
def test_f1_a_broken_body_goes_on_at_its_offset_and_version(
    stored: Stored, proxy: FaultProxy, kind: str, reason: str
) -> None:
    """F1: four ranges break after 300,000 bytes; what has come is not asked for again."""
    broken: list[Asked] = []
    proxy.add(kind, times=4, after=300_000, hook=broken.append)
    done = loaded(stored, proxy)
    assert proxy.fired == {kind: 4}
    assert done.retries == {reason: 4}
    pinned = {r.headers.get("If-Match") for r in proxy.requests if r.first > 0}
    assert len(pinned) == 1
    assert None not in pinned
    assert all(resumed(proxy, asked, 300_000) for asked in broken)


def test_f1_a_connection_reset_before_any_answer_is_made_again(
    stored: Stored,
) -> None:
    """F1: a load balancer that is just being replaced."""
    with FaultProxy(stored.s3.endpoint_url, resets=3) as proxy:
        done = loaded(stored, proxy)
    assert proxy.fired == {"connection": 3}
    # It may come so early that it is the attempt to connect that fails.
    assert done.retries.keys() <= {"reset", "connect"}
    assert sum(done.retries.values()) == 3


def test_f1_ranges_that_always_break_end_the_load(stored: Stored, proxy: FaultProxy) -> None:
    """F1: attempts are bounded where each brings next to nothing."""
    proxy.add("reset", times=0, after=1, beyond=8 * MIB)
    assert "6 attempts" in str(unavailable(stored, proxy))
    assert proxy.fired["reset"] >= ATTEMPTS


def test_f1_the_deadline_ends_what_the_attempts_would_not(
    stored: Stored, proxy: FaultProxy
) -> None:
    """F1: one overall deadline, however many attempts are left."""
    patient = replace(POLICY, attempts=100_000, deadline=1.0)
    proxy.add("reset", times=0, after=1, beyond=8 * MIB)
    partial = Load()
    with pytest.raises(SourceUnavailableError, match="without progress"):
        load(stored.uri, stored.access(proxy.url, patient), stored.key, partial)
    assert partial.seconds > 0.5
    assert proxy.fired["reset"] > ATTEMPTS


# F2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_f2_passing_refusals_are_counted_by_reason(
    stored: Stored, proxy: FaultProxy, code: int
) -> None:
    """F2: at the first look too, and in the middle."""
    slow_down = b"<Error><Code>SlowDown</Code></Error>"
    proxy.add("status", code=code, body=slow_down, times=1, beyond=0)
    proxy.add("status", code=code, body=slow_down, times=4)
    done = loaded(stored, proxy)
    assert proxy.fired == {"status": 5}
    assert done.retries == {f"status_{code}": 5}


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_f2_retry_after_is_honoured(stored: Stored, proxy: FaultProxy, form: str) -> None:
    """F2: nobody asks for that range before the server wants it."""

    def headers() -> dict[str, str]:
        # A date has whole seconds: two ahead of the answer are at least one.
        date = formatdate(time.time() + 2, usegmt=True)
        return {"Retry-After": "1" if form == "seconds" else date}

    proxy.add("status", headers=headers, beyond=8 * MIB)
    loaded(stored, proxy)
    assert proxy.fired == {"status": 1}
    waits = [
        later.at - earlier.at
        for earlier, later in itertools.combinations(proxy.requests, 2)
        if earlier.first == later.first > 0
    ]
    # Another connection may read it in the meantime, but not this one.
    assert waits
    assert max(waits) >= 0.95


def test_f2_waits_are_random_below_a_bound_that_doubles(stored: Stored, proxy: FaultProxy) -> None:
    """F2: full jitter, so that a thousand clients do not come back in the same moment."""
    policy = replace(POLICY, attempts=7, deadline=60, backoff_base=0.01, backoff_cap=10)
    proxy.add("status", times=6, at=stored.inside("embed"))
    access = stored.access(proxy.url, policy)
    assert load(stored.uri, access, stored.key, connections=1).digests == stored.digests
    assert proxy.fired == {"status": 6}
    same = [r.at for r in proxy.requests if r.first <= stored.inside("embed") <= r.last]
    waits = [b - a for a, b in itertools.pairwise(same)]
    assert len(waits) == 6
    # The machine may be slow, so each bound has room; that they differ is what counts.
    assert all(wait < 0.01 * 2**n + 1 for n, wait in enumerate(waits, 1))
    assert len({round(wait, 4) for wait in waits}) > 3


def test_f2_a_server_that_is_never_ready_ends_the_load(stored: Stored, proxy: FaultProxy) -> None:
    """F2: exit code 69, with what the server said."""
    proxy.add("status", code=503, times=0, beyond=8 * MIB)
    assert "answers 503" in str(unavailable(stored, proxy))
    assert proxy.fired["status"] >= ATTEMPTS


def test_f2_a_retry_after_beyond_the_deadline_ends_the_load(
    stored: Stored, proxy: FaultProxy
) -> None:
    """F2: waiting for what comes too late helps nobody."""
    proxy.add("status", times=0, headers={"Retry-After": "30"}, beyond=8 * MIB)
    unavailable(stored, proxy)
    # Each of four connections asked once, and did not wait to ask again.
    assert 1 <= proxy.fired["status"] <= 4


def test_f2_a_server_never_ready_ends_the_commands_with_69(
    stored: Stored, proxy: FaultProxy
) -> None:
    """F2: TENSORSERVE_FETCH_DEADLINE bounds it."""
    proxy.add("status", code=503, times=0, beyond=8 * MIB)
    uri = f"s3://{BUCKET}/{stored.name.rpartition('/')[0]}"
    code, text = command(stored, proxy, "verify", uri, TENSORSERVE_FETCH_DEADLINE="1")
    assert code == 69, text
    assert "the server answers 503" in text
    assert proxy.fired["status"] >= 2


def test_f2_a_listing_is_tried_again_too(stored: Stored, proxy: FaultProxy) -> None:
    """F2: through botocore, and not only ranges."""
    proxy.add("status", code=503, times=2, beyond=0)
    prefix = stored.name.rpartition("/")[0]
    names = list_names(f"s3://{BUCKET}/{prefix}", stored.access(proxy.url))
    assert names is not None
    assert names["model.tensors"] == len(stored.data)
    assert proxy.fired == {"status": 2}


# F3 -----------------------------------------------------------------------------------------------


def test_f3_a_stalled_range_goes_on_elsewhere(stored: Stored, proxy: FaultProxy) -> None:
    """F3: nothing comes any more and nobody says so; the connection is given up."""
    stalled: list[Asked] = []
    proxy.add("stall", times=2, after=300_000, hook=stalled.append)
    done = loaded(stored, proxy, IMPATIENT, connections=1)
    assert proxy.fired == {"stall": 2}
    assert stalls(done) >= 2
    assert all(resumed(proxy, asked, 300_000) for asked in stalled)


def test_f3_many_connections_that_stall_together(stored: Stored, proxy: FaultProxy) -> None:
    """F3: a switch reboots."""
    proxy.add("stall", times=6, after=100_000)
    done = loaded(stored, proxy, IMPATIENT, connections=6)
    assert proxy.fired["stall"] >= 2
    # Some may be overtaken: another connection reads what this one is slow with.
    assert set(done.retries) == {"stall"}


def test_f3_a_trickle_is_as_good_as_a_stall(stored: Stored, proxy: FaultProxy) -> None:
    """F3: 2 kB/s keep a socket alive, and a start for hours."""
    proxy.add("slow", times=2, after=100_000, rate=2000)
    done = loaded(stored, proxy, IMPATIENT, connections=1)
    assert proxy.fired == {"slow": 2}
    assert stalls(done) >= 2


@pytest.mark.parametrize("beyond", [0, 1])
def test_f3_no_answer_at_all(stored: Stored, proxy: FaultProxy, beyond: int) -> None:
    """F3: the request was taken and nothing comes, at the first look or in the middle."""
    proxy.add("silent", beyond=beyond)
    done = loaded(stored, proxy, IMPATIENT, connections=1)
    assert proxy.fired == {"silent": 1}
    assert stalls(done) >= 1


@pytest.mark.parametrize("beyond", [0, 1])
def test_f3_a_header_that_never_ends(stored: Stored, proxy: FaultProxy, beyond: int) -> None:
    """F3: the watchdog watches the answer's header too."""
    proxy.add("drip", beyond=beyond)
    done = loaded(stored, proxy, IMPATIENT, connections=1)
    assert proxy.fired == {"drip": 1}
    assert stalls(done) >= 1


# Nothing but another connection that has nothing to do can help within it.
PATIENT = replace(POLICY, stall_timeout=25.0)


@pytest.mark.parametrize("kind", ["stall", "slow"])
def test_f3_one_late_connection_delays_nothing(
    stored: Stored, proxy: FaultProxy, kind: str
) -> None:
    """F3: long before it would be given up. What is sealed is read a second time."""
    proxy.add(kind, after=100_000, rate=40_000)
    done = loaded(stored, proxy, PATIENT)
    assert proxy.fired == {kind: 1}
    # Nobody waited until it was given up.
    assert "stall" not in done.retries


@pytest.mark.parametrize("kind", ["stall", "slow", "silent"])
def test_f3_one_late_connection_delays_no_plain_load_either(
    stored: Stored, tmp_path: Path, kind: str
) -> None:
    """F3: what is received where it belongs is asked for anew, from where it stands."""
    with RangeServer(plain_bundle(tmp_path)) as server, FaultProxy(server.url) as proxy:
        proxy.add(kind, after=300_000, rate=40_000, beyond=8 * MIB)
        done = load(f"{proxy.url}/model.tensors", Access(policy=PATIENT), None)
        # One that has not begun to answer has written nowhere: another reads it.
        # On a busy machine the second request may be late as well.
        assert done.retries.keys() == (set() if kind == "silent" else {"slow"})
        assert done.digests == stored.digests
        assert proxy.fired == {kind: 1}


def test_f3_a_server_that_stalls_without_end_ends_the_load(
    stored: Stored, proxy: FaultProxy
) -> None:
    """F3: exit code 69 at the deadline."""
    proxy.add("stall", times=0, after=10, beyond=8 * MIB)
    said = f"127.0.0.1:{proxy.port} sent nothing for 0.3 s"
    assert said in str(unavailable(stored, proxy, replace(IMPATIENT, attempts=4)))
    assert proxy.fired["stall"] >= 4


# F4 -----------------------------------------------------------------------------------------------


def test_f4_a_200_to_a_range_is_never_data(stored: Stored, proxy: FaultProxy) -> None:
    """F4: the whole file from its beginning, where its middle was asked for."""
    proxy.add("whole", body=stored.data, beyond=8 * MIB)
    assert "answered 200 to a request for a range" in str(unavailable(stored, proxy))
    assert proxy.fired == {"whole": 1}


def test_f4_a_server_without_ranges_is_refused_at_the_first_look(
    stored: Stored, proxy: FaultProxy
) -> None:
    """F4: before anything is loaded."""
    proxy.add("whole", body=stored.data, times=0, beyond=0)
    assert "does not serve ranges" in str(unavailable(stored, proxy))
    assert proxy.fired == {"whole": 1}


@pytest.mark.parametrize("kind", ["range", "no_range"])
def test_f4_a_wrong_or_missing_content_range_is_never_data(
    stored: Stored, proxy: FaultProxy, kind: str
) -> None:
    """F4: once or twice it is tried again."""
    proxy.add(kind, times=1, beyond=0)
    proxy.add(kind, times=3)
    done = loaded(stored, proxy)
    assert proxy.fired == {kind: 4}
    assert done.retries == {"wrong_range": 4}


@pytest.mark.parametrize("kind", ["range", "no_range"])
def test_f4_without_end_it_is_fatal(stored: Stored, proxy: FaultProxy, kind: str) -> None:
    """F4: exit code 69."""
    proxy.add(kind, times=0)
    unavailable(stored, proxy)
    assert proxy.fired[kind] >= ATTEMPTS


# All together -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_f1_to_f4_and_f8_in_any_order(stored: Stored, seed: int) -> None:
    """F1, F2, F3, F4, F8: every second request suffers something."""
    with FaultProxy(stored.s3.endpoint_url, seed=seed) as proxy:
        chance = {"chance": 0.12, "times": 12}
        proxy.add("reset", after=70_000, **chance)
        proxy.add("short", after=200_000, **chance)
        proxy.add("stall", after=50_000, **(chance | {"times": 4}))
        proxy.add("status", code=503, **chance)
        proxy.add("range", **chance)
        proxy.add("flip", at=stored.inside("embed"))
        patient = stored.access(proxy.url, replace(IMPATIENT, attempts=12, deadline=10))
        done = load(stored.uri, patient, stored.key)
    assert done.digests == stored.digests
    assert proxy.fired.total() >= 3
    assert done.retries
