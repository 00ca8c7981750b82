"""Only what was not printed before is an advance."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.telemetry import EventLog, events_path, read_events
from tensorserve.telemetry.output import SECONDS_BETWEEN_EVENTS, NewLines, OutputWatch
from tensorserve.telemetry.schema import OutputAdvanced

WAITING = (
    b"(EngineCore pid=%d) INFO 11-30 13:%d:39 [shm_broadcast.py:872] No available shared memory "
    b"broadcast block found in 60 seconds.\n"
)


def test_a_line_that_comes_again_is_not_new() -> None:
    """vLLM says that it waits every 60 s, with another time each time."""
    lines = NewLines()
    assert lines.feed(WAITING % (7, 33))
    assert not lines.feed(WAITING % (7, 34))
    assert not lines.feed(WAITING % (8, 35))
    assert lines.feed(b"INFO 11-30 13:36:00 Graph capturing finished\n")


@pytest.mark.parametrize(
    "again",
    [
        b"Capturing: 50%|#####     | 2/4 [00:02<00:02, 1.00s/it]\r",
        b"\x1b[32mCapturing\x1b[0m: 50%|#####     | 2/4\n",
        b"[2/4] nvcc -o kernel_2.o\n",
    ],
)
def test_a_bar_that_goes_on_is_new(again: bytes) -> None:
    """How far it is counts, the time that it took does not."""
    lines = NewLines()
    assert lines.feed(again.replace(b"2/4", b"1/4"))
    assert lines.feed(again)
    assert not lines.feed(again.replace(b"00:02", b"00:09"))


def test_a_line_counts_when_it_has_ended() -> None:
    """However it is cut; empty lines never."""
    lines = NewLines()
    assert [lines.feed(part) for part in (b"Loa", b"ding", b"\n", b"\n \n")] == [0, 0, 1, 0]
    assert not lines.feed(b"Load" + b"ing\n")
    assert lines.feed(b"x" * 100_000 + b"\n")


def test_only_so_many_lines_are_kept() -> None:
    """A start may print for hours."""
    lines = NewLines()
    assert lines.feed(b"first\n")
    for number in range(5000):
        lines.feed(b"%s\n" % (b"x" * number))
    assert lines.feed(b"first\n")
    assert len(lines._known) == 4096


def test_the_log_is_told_once_in_a_while(tmp_path: Path) -> None:
    """What came meanwhile is told later, and nothing is told twice."""
    output = OutputWatch(EventLog(events_path(tmp_path)))

    def told(now: float) -> int:
        output.tell(now)
        return len(read_events(events_path(tmp_path)))

    assert told(100) == 0
    output.take(1, b"a\n")
    assert told(100) == 1
    output.take(2, b"b\n")
    assert told(100 + SECONDS_BETWEEN_EVENTS / 2) == 1
    assert told(100 + SECONDS_BETWEEN_EVENTS) == 2
    assert told(200) == 2
    assert {type(record.event) for record in read_events(events_path(tmp_path))} == {OutputAdvanced}


def test_streams_are_cut_into_lines_each() -> None:
    """Two processes may write at once; a line's beginning is not another's end."""
    lines = [NewLines(), NewLines()]
    assert not lines[0].feed(b"half of")
    assert lines[1].feed(b"whole\n")
    assert lines[0].feed(b" one\n")
