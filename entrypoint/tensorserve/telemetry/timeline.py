"""Which phase of a start ran when? Segments without gaps: their sum is the start's duration.

Times are monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorserve.telemetry.names import PHASES, Phase


@dataclass
class Segment:
    """An interval of one phase; `end` is None while it runs."""

    phase: Phase
    begin: float
    end: float | None = None
    presumed: bool = False
    """Begun by the end of the phase before; no event has named it yet."""


@dataclass
class Timeline:
    """The phases of one start, in order of appearance."""

    segments: list[Segment] = field(default_factory=list)

    @property
    def current(self) -> Segment | None:
        """The last one that began."""
        return self.segments[-1] if self.segments else None

    def presume(self, phase: Phase, moment: float) -> None:
        """`phase` has begun, though no event says so yet."""
        self._switch(Segment(phase, moment, presumed=True))

    def begin(self, phase: Phase, moment: float) -> None:
        """Take the begin of `phase`. It may name the one that was presumed."""
        current = self.current
        if current is not None and (current.presumed or current.phase == phase):
            current.phase, current.presumed = phase, False
            return
        self._switch(Segment(phase, moment))

    def end(self, phase: Phase, moment: float) -> bool:
        """Take the end of `phase`; False where another phase runs.

        The next phase begins at once, named or not. After the last one nothing follows but ready.
        """
        if self.current is None or self.current.phase != phase:
            return False
        if phase != PHASES[-1]:
            self.presume(PHASES[PHASES.index(phase) + 1], moment)
        return True

    def finish(self, moment: float) -> None:
        """End the last segment: the start is ready, or has ended."""
        if self.current is not None:
            self.current.end = max(moment, self.current.begin)

    def seconds(self, end: float) -> dict[Phase, float]:
        """Seconds of each phase reached, in order of appearance; a running one ends at `end`."""
        durations: dict[Phase, float] = {}
        for segment in self.segments:
            last = end if segment.end is None else segment.end
            durations[segment.phase] = durations.get(segment.phase, 0.0) + last - segment.begin
        return durations

    def _switch(self, following: Segment) -> None:
        if self.current is not None:
            # Two processes' lines may be written in another order than their times.
            following.begin = max(following.begin, self.current.begin)
            self.current.end = following.begin
        self.segments.append(following)
