"""demo/s3server.py: what is started is stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from s3server import signals_held


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_takes_effect_when_the_process_is_known() -> None:
    started = []

    def start() -> None:
        with signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            started.append("process")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert started == ["process"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_ignored_stays_ignored() -> None:
    """A shell's background job is born so; the server that it starts inherits it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals_held():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_nothing_is_changed() -> None:
    seen = []

    def run() -> None:
        with signals_held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
