"""Does the terminal show the start without getting in the way of other output?"""

from __future__ import annotations

import io
import os
import pty
from collections.abc import Iterator
from typing import TextIO

import pytest

from telemetry_starts import at, begin, end, progress, whole_start
from tensorserve.telemetry import ProgressView, StartState, fold
from tensorserve.telemetry.fold import apply
from tensorserve.telemetry.progress import describe


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TextIO, int]]:
    """(a stream on a real pseudo-terminal, the descriptor to read what a person sees)."""
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = pty.openpty()
    with open(writer, "w", encoding="utf-8") as stream:
        yield stream, reader
    os.close(reader)


def shown_on(terminal: tuple[TextIO, int]) -> str:
    """What has come since the last call. The kernel hands it on in pieces: a mark ends it."""
    stream, reader = terminal
    stream.write("\0")
    stream.flush()
    seen = b""
    while not seen.endswith(b"\0"):
        seen += os.read(reader, 4096)
    return seen[:-1].decode()


def loading(copied: int = 500) -> StartState:
    return fold([*whole_start()[:10], progress(136, copied)])


def test_a_terminal_gets_one_line_with_bar_size_rate_and_eta(
    terminal: tuple[TextIO, int],
) -> None:
    """All that one wants to know, redrawn in place."""
    ProgressView(terminal[0]).update(loading(), now=136)
    shown = shown_on(terminal)
    assert "\n" not in shown
    for part in ("████████████░░░░░░░░░░░░", "load", "50%", "GiB/s", "ETA 0:05"):
        assert part in shown


def test_a_line_never_runs_over_the_edge(terminal: tuple[TextIO, int]) -> None:
    """A wrapped line could not be erased."""
    import fcntl
    import struct
    import termios

    stream, _ = terminal
    fcntl.ioctl(stream, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    ProgressView(stream).update(loading(), now=136)
    assert len(shown_on(terminal).removeprefix("\r\x1b[2K")) == 29


def test_the_bar_makes_room_for_other_output_and_comes_back(terminal: tuple[TextIO, int]) -> None:
    """Logs of the engine appear between two drawings."""
    view = ProgressView(terminal[0])
    view.update(loading(), now=136)
    shown_on(terminal)
    view.clear()
    assert shown_on(terminal) == "\r\x1b[2K"
    view.update(loading(), now=136.01)
    assert "50%" in shown_on(terminal)


def test_the_end_leaves_a_line_and_no_bar(terminal: tuple[TextIO, int]) -> None:
    """Ready, with the seconds it took."""
    view = ProgressView(terminal[0])
    view.update(loading(), now=136)
    shown_on(terminal)
    view.update(fold(whole_start()), now=160)
    view.close()
    assert shown_on(terminal) == "\r\x1b[2Ktensorserve: ready after 60.0 s\r\n"


def test_a_pipe_gets_a_line_at_each_phase_and_each_tenth() -> None:
    """Without control characters, and not one line for each event."""
    stream = io.StringIO()
    view = ProgressView(stream)
    state = StartState()
    events = [
        at(0, "start", start_id="a"),
        begin(0, "preflight"),
        end(1, "preflight"),
        begin(1, "import"),
        begin(2, "load"),
        at(2, "load_plan", rank=0, bytes=1000, tensors=1),
        *[progress(2 + n / 100, n * 10) for n in range(1, 101)],
        at(3, "load_done", rank=0),
        end(3, "load"),
        begin(4, "warmup"),
        at(9, "ready"),
    ]
    for event in events:
        apply(state, event)
        view.update(state, now=event.t)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert [line.split()[1] for line in lines if "load" not in line] == [
        "preflight", "artifacts", "import", "postprocess", "warmup", "ready"
    ]  # fmt: skip
    percents = [int(line.split("%")[0].split()[-1]) for line in lines if "%" in line]
    assert percents == list(range(10, 101, 10))


def test_a_load_by_the_reference_reader_says_so() -> None:
    """In each line of the load: somebody may wonder why it is slow."""
    state = StartState()
    plan = at(1, "load_plan", rank=0, bytes=1000, tensors=1, loader="reference")
    for event in (at(0, "start", start_id="a"), begin(1, "load"), plan):
        apply(state, event)
    assert describe(state, 2).startswith("load with the reference reader   0%")


def test_a_pipe_gets_a_line_every_five_seconds_of_a_slow_load() -> None:
    """So that one sees that it lives; not more often."""
    stream = io.StringIO()
    view = ProgressView(stream)
    for tenth_of_second in range(200):
        view.update(loading(0), now=140 + tenth_of_second / 10)
    assert len(stream.getvalue().splitlines()) == 4


def test_output_that_nobody_reads_any_more_ends_nothing() -> None:
    """A broken pipe on stderr is no reason to stop serving."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True)
    view = ProgressView(stream)
    view.update(loading(100), now=136)
    view.update(loading(900), now=137)
    view.close()


def test_nothing_is_drawn_for_a_start_that_ended(terminal: tuple[TextIO, int]) -> None:
    """The error message that follows must stand alone."""
    view = ProgressView(terminal[0])
    view.update(loading(), now=136)
    shown_on(terminal)
    view.update(fold([*whole_start()[:10], at(137, "engine_exit", code=65)]), now=137)
    assert shown_on(terminal) == "\r\x1b[2K"
