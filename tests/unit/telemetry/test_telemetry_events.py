"""Does the event log keep every line whole, and never stand in a start's way?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from os import getpid
from pathlib import Path

import pytest

from tensorserve.secret import Secret
from tensorserve.telemetry import EventLog, Follower, events_path, new_log, read_events
from tensorserve.telemetry.event_codec import Record
from tensorserve.telemetry.schema import EngineExited, FailureScraped, StartFailed


def codes(records: list[Record]) -> list[int]:
    """Of events that are all `engine_exit`."""
    return [record.event.code for record in records if isinstance(record.event, EngineExited)]


def test_an_event_carries_both_clocks_the_process_and_its_fields(tmp_path: Path) -> None:
    """What is emitted is what is read, with t, w and pid added."""
    EventLog(tmp_path / "log").emit(EngineExited(5))
    line = json.loads((tmp_path / "log").read_bytes())
    assert line == {
        "t": line["t"],
        "w": line["w"],
        "pid": getpid(),
        "event": "engine_exit",
        "code": 5,
    }
    assert read_events(tmp_path / "log") == [Record(line["t"], line["w"], EngineExited(5))]


def test_the_log_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    """Messages name the user's files."""
    EventLog(tmp_path / "log").emit(FailureScraped())
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_processes_that_write_at_once_leave_whole_lines(tmp_path: Path) -> None:
    """4 processes with 1000 events each make 4000 lines, none lost and none mixed."""
    path = tmp_path / "log"
    code = (
        "import sys, pathlib; from tensorserve.telemetry import EventLog\n"
        "from tensorserve.telemetry.schema import StartFailed\n"
        "log = EventLog(pathlib.Path(sys.argv[1]))\n"
        "for n in range(1000): log.emit(StartFailed(sys.argv[2], 1, f'{n}' + 'x' * n))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, path, str(i)]) for i in range(4)]
    assert [writer.wait(30) for writer in writers] == [0] * 4
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(lines) == 4000
    assert Counter(line["reason"] for line in lines) == dict.fromkeys("0123", 1000)
    assert all(line["message"].count("x") == int(line["message"].strip("x")) for line in lines)


def test_a_full_disk_ends_no_start_and_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full answers every write with ENOSPC."""
    log = EventLog(Path("/dev/full"))
    for _ in range(3):
        log.emit(FailureScraped())
    assert log.failed_writes == 3
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "No space left on device" in said


def test_a_missing_directory_ends_no_start(tmp_path: Path) -> None:
    """Opening the log may fail just as writing may."""
    log = EventLog(tmp_path / "absent" / "log")
    log.emit(FailureScraped())
    assert log.failed_writes == 1


def test_the_event_after_a_torn_write_is_whole(tmp_path: Path) -> None:
    """A file size limit cuts a line short; once there is room, the next line stands alone."""
    path = tmp_path / "log"
    code = (
        "import pathlib, resource, sys; from tensorserve.telemetry import EventLog\n"
        "from tensorserve.telemetry.schema import EngineExited\n"
        "log = EventLog(pathlib.Path(sys.argv[1])); log.emit(EngineExited(1))\n"
        "size, hard = pathlib.Path(sys.argv[1]).stat().st_size, resource.RLIM_INFINITY\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, hard)); log.emit(EngineExited(2))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)); log.emit(EngineExited(3))\n"
        "assert log.failed_writes == 1\n"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True)
    follower = Follower(path)
    assert codes(follower.poll()) == [1, 3]
    assert follower.damaged == 1


def test_a_torn_last_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    """A reader that comes between two halves of a line neither fails nor loses it."""
    path = tmp_path / "log"
    log = EventLog(path)
    log.emit(EngineExited(1))
    log.emit(EngineExited(2))
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    follower = Follower(path)
    assert codes(follower.poll()) == [1]
    with path.open("ab") as file:
        file.write(data[-7:])
    assert codes(follower.poll()) == [2]
    assert follower.poll() == []


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b'{"event": "x"}',
        b'{"t": NaN, "event": "x"}',
        b'{"t": 1}',
        b'{"t": 1, "event": ["x"]}',
        b'{"t": true, "event": "x"}',
        b'{"t": 1' + b"0" * 30 + b', "event": "x"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"t": 1, "event": "x", "pad": "' + b"x" * 1024 * 1024 + b'"}',
    ],
    ids=range(11),
)
def test_a_line_that_is_no_event_is_skipped_and_counted(tmp_path: Path, line: bytes) -> None:
    """Damage costs the damaged line alone."""
    path = tmp_path / "log"
    path.write_bytes(line + b'\n{"t": 1, "event": "engine_exit", "code": 4}\n')
    follower = Follower(path)
    assert codes(follower.poll()) == [4]
    assert follower.damaged == 1


def test_a_follower_waits_for_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    """The exporter may be up before the first event."""
    follower = Follower(tmp_path / "log")
    assert follower.poll() == []
    EventLog(tmp_path / "log").emit(EngineExited(1))
    assert codes(follower.poll()) == [1]


def test_a_new_log_puts_the_one_before_aside(tmp_path: Path) -> None:
    """The start before the last can still be looked at."""
    new_log(tmp_path).emit(EngineExited(1))
    new_log(tmp_path).emit(EngineExited(2))
    assert codes(read_events(events_path(tmp_path))) == [2]
    previous = tmp_path / "events.previous.jsonl"
    assert codes(read_events(previous)) == [1]


def test_a_follower_goes_over_to_a_new_log(tmp_path: Path) -> None:
    """The file at the path counts, not the one that was there."""
    new_log(tmp_path).emit(EngineExited(1))
    follower = Follower(events_path(tmp_path))
    follower.poll()
    new_log(tmp_path).emit(EngineExited(2))
    assert codes(follower.poll()) == [2]


def test_a_left_over_process_does_not_write_into_the_new_log(
    tmp_path: Path,
) -> None:
    """Its events would be taken for the new start's."""
    left_over = new_log(tmp_path)
    left_over.emit(EngineExited(1))
    new_log(tmp_path).emit(EngineExited(2))
    left_over.emit(EngineExited(3))
    assert codes(read_events(events_path(tmp_path))) == [2]


def test_a_secret_in_an_event_is_not_written(tmp_path: Path) -> None:
    """Values that are not JSON are written as text, and a Secret's text is stars."""
    EventLog(tmp_path / "log").emit(StartFailed("corrupt", 65, Secret("canary")))  # type: ignore[arg-type]
    assert b"canary" not in (tmp_path / "log").read_bytes()
