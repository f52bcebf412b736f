"""The other nodes of an allocation, as the head sees them and as they see the head.

Everything goes through files (`miles.cluster.launch`), so that a node that is cut off is one that falls silent. Owns
when a node counts as lost. What this node's own processes do belongs to `miles.cluster.supervisor`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from miles.cluster.endings import EndedEarly
from miles.cluster.launch import (
    Failure,
    Launch,
    NodeReport,
    Over,
    read_launch,
    read_report,
    refusal,
    write_launch,
    write_report,
)
from miles.errors import MilesError, RunError
from miles.runs.attempts import EndReason


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient nodes are with each other, in seconds. Shared file systems show a new file up to a minute late."""

    beat: float = 3.0
    """Between two reports of a node."""
    silence: float = 60.0
    """Without a new report, after which a node is lost."""
    arrival: float = 120.0
    """From the launch to a node's first report."""
    launch: float = 600.0
    """How long a node waits for the launch: Python starts slowly where all nodes read it from one file system."""
    leaving: float = 20.0
    """How long the head waits, in the end, until the others have ended their processes."""
    look: float = 0.5
    """Between two looks at the others' files."""


class Reporter:
    """Writes this node's report: every `beat` seconds, and at once when it has news."""

    def __init__(self, directory: Path, report: NodeReport, timing: Timing) -> None:
        self._directory = directory
        self.latest = report
        self._timing = timing
        self._written: float | None = None

    def report(self, **news: object) -> None:
        """Write what is new, or that nothing is."""
        report = replace(self.latest, **news)  # type: ignore[arg-type]
        now = time.monotonic()
        if report != self.latest or self._written is None or now - self._written >= self._timing.beat:
            self.latest = replace(report, beat=report.beat + 1, time=time.time())
            write_report(self._directory, self.latest)
            self._written = now


class Neighbour:
    """Another node: its newest report, and for how long there was none."""

    def __init__(self, directory: Path, index: int, timing: Timing) -> None:
        self.index = index
        self.latest: NodeReport | None = None
        self.beats = 0
        """Reports that were new when they were read here."""
        self._directory = directory
        self._timing = timing
        self._heard = time.monotonic()
        self._looked: float | None = None

    def look(self) -> bool:
        """Read its report, unless that was done a moment ago; whether there is a new one."""
        now = time.monotonic()
        elapsed = self._timing.look if self._looked is None else now - self._looked
        if elapsed < self._timing.look:
            return False
        self._looked = now
        if elapsed > self._timing.look + self._timing.beat:
            self._heard += elapsed  # this node was suspended, or its file system was: nobody is to blame for that
        report = read_report(self._directory, self.index)
        if report is None or (self.latest is not None and report.beat == self.latest.beat):
            return False
        self.latest, self._heard = report, now
        self.beats += 1
        return True

    @property
    def silence(self) -> float:
        """Seconds since its last report, or since there could be a first."""
        return time.monotonic() - self._heard

    @property
    def lost(self) -> bool:
        """Whether it has been silent for too long."""
        if self.latest is not None and self.latest.gone:
            return False
        return self.silence > (self._timing.arrival if self.latest is None else self._timing.silence)


class Followers:
    """The other nodes as the head sees them; with one node there are none, and nothing is written."""

    def __init__(
        self, launch_file: Path | None, launch: Launch, reports: Path, own: NodeReport, timing: Timing
    ) -> None:
        """`launch_file`: None where there is no allocation."""
        self._file = launch_file
        self.launch = launch
        self._timing = timing
        self._others = [Neighbour(reports, index, timing) for index in range(1, len(launch.nodes))]
        self._reporter = Reporter(reports, own, timing) if self._others else None
        self._beats_at_failure: dict[int, int] | None = None
        if launch_file is not None:
            write_launch(launch_file, launch)

    @property
    def port(self) -> int:
        return self.launch.port

    def meet_at(self, port: int) -> None:
        """Have the ranks of all nodes begin anew, and meet at another port."""
        self.launch = replace(self.launch, port=port)
        self._beats_at_failure = None
        if self._file is not None:
            write_launch(self._file, self.launch)
        self.report(port=port, ranks="running", failures=())

    def report(self, **news: object) -> None:
        """Tell the others what is new here."""
        if self._reporter is not None:
            self._reporter.report(**news)

    def look(self) -> None:
        """Read the reports. Raises EndedEarly when a node is lost, RunError when one cannot take part, and what ended
        the supervision of one."""
        for other in self._others:
            if other.look():
                assert other.latest is not None
                problem = refusal(self.launch, other.latest, time.time())
                if problem is not None:
                    raise problem
                if other.latest.error is not None:
                    raise other.latest.error.error()
            elif other.lost:
                raise self._lost(other)

    def finished(self) -> bool:
        """Whether the ranks of all of them have ended well."""
        return all(self._ranks(other) == "finished" for other in self._others)

    def ended(self) -> bool:
        """Whether no rank of theirs runs any more."""
        return all(self._ranks(other) != "running" for other in self._others)

    def gone(self) -> bool:
        """Whether all of them have ended all their processes, as far as they can still say so."""
        return all(other.latest is None or other.latest.gone or other.lost for other in self._others)

    def failures(self) -> list[Failure]:
        """Ranks of theirs that failed since all of them last began."""
        reports = (other.latest for other in self._others)
        return [
            failure for report in reports if report and report.port == self.launch.port for failure in report.failures
        ]

    def signalled(self) -> bool:
        """Whether one of them was asked to stop."""
        return any(other.latest is not None and other.latest.signalled for other in self._others)

    def engines_came_up(self) -> bool:
        """Whether all their engines have answered."""
        return all(other.latest is not None and other.latest.engines_came_up for other in self._others)

    def have_spoken(self) -> bool:
        """After a rank has failed: whether every other node has had the time to say what happened there.

        A rank that loses its peer fails at once, and what killed the peer is known only later.
        """
        if self._beats_at_failure is None:
            self._beats_at_failure = {other.index: other.beats for other in self._others}
        return all(other.beats >= self._beats_at_failure[other.index] + 2 for other in self._others)

    @contextmanager
    def told_the_end(self) -> Iterator[None]:
        """In the end, tell them how the block ended, and give them time to end their processes."""
        exit_code = 1
        try:
            yield
            exit_code = 0
        except MilesError as error:
            exit_code = error.exit_code
            raise
        finally:
            self._tell_the_end(exit_code)

    def _tell_the_end(self, exit_code: int) -> None:
        if self._file is None:
            return
        write_launch(self._file, Over(exit_code))
        deadline = time.monotonic() + self._timing.leaving
        while not self.gone() and time.monotonic() < deadline:
            for other in self._others:
                other.look()
            self.report()
            time.sleep(self._timing.look)

    def _ranks(self, other: Neighbour) -> str:
        if other.latest is None or other.latest.port != self.launch.port:
            return "running"
        return other.latest.ranks

    def _lost(self, other: Neighbour) -> EndedEarly | RunError:
        name = self.launch.nodes[other.index]
        if other.latest is None:
            return RunError(
                f"node {name} has not reported within {self._timing.arrival:g} s: it does not run, or does not see "
                f"{self._file}",
                fix=f"`srun -w {name} ls {self._file}` shows whether that directory is shared",
            )
        return EndedEarly(f"node {name} is lost: no report for {self._timing.silence:g} s", EndReason.NODE_FAILURE)


class Head:
    """The head as another node sees it."""

    def __init__(self, launch_file: Path, launch: Launch, reports: Path, reporter: Reporter, timing: Timing) -> None:
        """Raises RunError when this node cannot take part."""
        self._file = launch_file
        self._head = Neighbour(reports, 0, timing)
        self._reporter = reporter
        self._timing = timing
        self._looked = time.monotonic()
        self.launch = launch
        self.over: Over | None = None
        """The head's last word."""
        problem = refusal(launch, replace(reporter.latest, time=time.time()), time.time())
        if problem is not None:
            raise problem

    @property
    def port(self) -> int:
        return self.launch.port

    def report(self, **news: object) -> None:
        """Tell the head what is new here."""
        self._reporter.report(**news)

    def look(self) -> None:
        """Read what the head says. Raises EndedEarly when it is lost."""
        self._head.look()
        if time.monotonic() - self._looked >= self._timing.look:
            self._looked = time.monotonic()
            word = read_launch(self._file)
            if isinstance(word, Over):
                self.over = word
            elif word is not None:
                self.launch = word
        if self._head.lost and self.over is None:
            name = self.launch.nodes[0]
            raise EndedEarly(
                f"node {name}, the head, is lost: no report for {self._timing.silence:g} s", EndReason.NODE_FAILURE
            )


def wait_for_launch(file: Path, timing: Timing, stopped: Callable[[], bool]) -> Launch | Over:
    """The head's word, as soon as there is one. Raises RunError when none comes, EndedEarly when `stopped()`."""
    deadline = time.monotonic() + timing.launch
    while (word := read_launch(file)) is None:
        if stopped():
            raise EndedEarly("this node was stopped before the head began", EndReason.PREEMPTED)
        if time.monotonic() > deadline:
            raise RunError(
                f"the head of this job has written no {file} within {timing.launch:g} s",
                fix="its output says why; if it says that it has, the run directory is not shared between the nodes",
            )
        time.sleep(timing.look)
    return word
