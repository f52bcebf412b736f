"""A stage that begins from the same point as often as a proof needs it, and its result when nothing happens to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from miles.runs.paths import RunPaths
from tests.chaos.audit import checkpoint_findings, journal_findings, metric_findings, weight_findings
from tests.chaos.nursery import Nursery
from tests.chaos.run import STAGE, Case
from tests.chaos.shim import KILL, Shim
from tests.chaos.stages import Stage, copy_run, prepare


class Rehearsal:
    """One stage of a case. `rehearse` makes it; the shim watches its run directory."""

    def __init__(self, case: Case, name: str, directory: Path, nursery: Nursery, shim: Shim) -> None:
        self.shim = shim
        self.paths = RunPaths(_watched(directory))
        self._directory = directory
        self.before = prepare(case, directory / "before", until=name, nursery=nursery)
        """The run before the stage has begun."""
        self._stage = Stage(self.paths, name, nursery, directory)
        self.begin(self.before)
        shim.arm()
        self.finish()
        self.changes = shim.changes()
        """What the undisturbed stage did to the run directory."""
        self._undisturbed = copy_run(self.paths, RunPaths(directory / "undisturbed"))

    def begin(self, at: RunPaths) -> None:
        """Back to `before`, or to what `midway` returned."""
        copy_run(at, self.paths)
        self._stage.attempt = 0

    def run(self) -> int:
        """Run the stage from where it is; returns its exit code, negative for a signal."""
        return self._stage.run()

    def finish(self) -> None:
        """Run it to its end."""
        code = self.run()
        assert code == 0, f"exit code {code}\n{self.message()}"

    def message(self) -> str:
        """What the last run said: the error that ended it, and its log."""
        return self._stage.message()

    def midway(self, part: str) -> RunPaths:
        """The run when the stage is killed in place of its first change to a path that contains `part`."""
        self.begin(self.before)
        self.shim.arm(1, action=KILL, part=part)
        code = self.run()
        assert code == -9, f"exit code {code}\n{self.message()}"
        self.shim.arm()
        return copy_run(self.paths, RunPaths(self._directory / "midway"))

    def findings(self) -> list[str]:
        """What differs from the undisturbed stage, or is wrong in itself."""
        stages = (self._stage.name,)
        return [
            *weight_findings(self.paths, self._undisturbed, stages),
            *(journal_findings(self.paths, self._undisturbed) if STAGE in stages else []),
            *metric_findings(self.paths, self._undisturbed, stages),
            *checkpoint_findings(self.paths, stages),
        ]


@contextmanager
def rehearse(case: Case, name: str, directory: Path) -> Iterator[Rehearsal]:
    """A stage of a case in a new directory."""
    shim = Shim(directory / "shim", _watched(directory))
    with Nursery(case.backend, shim.environment) as nursery:
        yield Rehearsal(case, name, directory, nursery, shim)


def _watched(directory: Path) -> Path:
    return directory / "watched" / "proof"
