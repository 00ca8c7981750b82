"""How loads are run: each in a fresh process, interleaved, peers at their best, all verified."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.contestants import Job
from bench.directories import ROOT
from bench.model import Model
from bench.place import Place, clean_environment

# Time for imports, beside the load itself.
START_SECONDS = 30.0
# A trial that takes this many times longer than the best so far is stopped.
_HOPELESS = 1.5
_LONGEST_SECONDS = 1800.0

Sample = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """A line of the table, before it has figures."""

    name: str
    label: str
    module: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    sweep: tuple[str, tuple[int, ...]] | None = None
    """(option, values to try): the best is kept. The likeliest first: it bounds the others."""
    base: str | None = None
    """The contestant whose seconds are divided by this one's."""
    places: tuple[str, ...] | None = None
    """The places where it takes part; None: all."""
    moves_only: bool = False
    """It gives no tensors that could be compared."""


@dataclass
class Line:
    """A contestant in a place, with its samples."""

    place: str
    contestant: Contestant
    option: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class MismatchError(RuntimeError):
    """A load gave other tensors than were written."""


def run_place(
    place: Place,
    model: Model,
    contestants: Sequence[Contestant],
    repetitions: int,
    say: Callable[[str], None],
) -> list[Line]:
    """All contestants that take part in `place`. Raises MismatchError, RuntimeError."""
    lines = []
    for contestant in contestants:
        if contestant.places is not None and place.name not in contestant.places:
            continue
        lines.append(Line(place.name, contestant, _best(place, model, contestant, say)))
    for repetition in range(repetitions):
        # Another order in each round, so that no contestant always follows the same one.
        turn = repetition % len(lines)
        for line in [*lines[turn:], *lines[:turn]]:
            sample, note = load(place, model, line.contestant, line.option)
            assert sample is not None
            line.samples.append(sample)
            if note and note not in line.notes:
                line.notes.append(note)
            say(
                f"  {place.name} {repetition + 1}/{repetitions}  {sample['seconds']:8.2f} s  "
                f"{line.contestant.label}{shown_option(line.option)}{f'  ({note})' if note else ''}"
            )
    return lines


def shown_option(option: dict[str, Any]) -> str:
    """The setting that a sweep chose, for a label."""
    return "".join(f", {value} {name}" for name, value in option.items())


def _best(
    place: Place, model: Model, contestant: Contestant, say: Callable[[str], None]
) -> dict[str, Any]:
    """The value of the swept option that was fastest in one load each."""
    if contestant.sweep is None:
        return {}
    name, values = contestant.sweep
    best, best_seconds = values[0], _LONGEST_SECONDS
    for value in values:
        sample, _ = load(place, model, contestant, {name: value}, limit=_HOPELESS * best_seconds)
        if sample is None:
            say(f"  {place.name} trying  {contestant.label}, {value} {name}: too slow")
            continue
        say(f"  {place.name} trying {sample['seconds']:8.2f} s  {contestant.label}, {value} {name}")
        if sample["seconds"] < best_seconds:
            best, best_seconds = value, sample["seconds"]
    return {name: best}


def load(
    place: Place,
    model: Model,
    contestant: Contestant,
    option: dict[str, Any],
    limit: float | None = None,
) -> tuple[Sample | None, str | None]:
    """(figures, notes); no figures if the load took more than `limit` seconds."""
    note = place.before(contestant.kind)
    job = Job(
        contestant=contestant.module,
        uri=place.uris[contestant.kind],
        kind=contestant.kind,
        key_file=str(model.key_file) if contestant.kind == "encrypted" else None,
        options=contestant.options | option,
    )
    sample = measure(job, dict(place.environment), limit)
    if sample is None:
        return None, note
    if not contestant.moves_only and sample["digest"] != model.digest:
        raise MismatchError(
            f"{contestant.label} in {place.name} gave other tensors than were written "
            f"({sample['digest']} instead of {model.digest})"
        )
    sample["bytes"] = model.bytes
    return sample, note


def measure(job: Job, environment: dict[str, str], limit: float | None = None) -> Sample | None:
    """Run the job in a process of its own. None if it took more than `limit` seconds.

    Raises RuntimeError with what it printed if it failed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.measure"],
        cwd=ROOT,
        env=clean_environment() | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(
            job.to_json(), timeout=START_SECONDS + (_LONGEST_SECONDS if limit is None else limit)
        )
    except subprocess.TimeoutExpired:
        if limit is None:
            raise
        return None
    finally:
        end_session(process)
    if process.returncode or not output.strip():
        raise RuntimeError(f"{job.contestant} on {job.uri} failed:\n{errors[-4000:]}")
    return dict(json.loads(output.strip().splitlines()[-1]))


def end_session(process: subprocess.Popen[Any]) -> None:
    """Kills a process and its descendants (it was started in its own session)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    else:
        # A pause: init reaps the last children, which must not run beside the next load.
        time.sleep(0.05)
    process.wait()
