"""What the nodes of an allocation tell each other, by files of the run directory: the launch and the node reports.

The head writes `allocations/JOB-RESTART.json`: what to start, where the ranks meet, and in the end how it ended. Each
node writes `logs/attempt-N/nodes/INDEX.json` every few seconds: that it lives, and what failed there. Each file has one
writer. Owns their formats and what two nodes must have in common; who acts on them is `miles.cluster.peers`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

import miles
from miles import errors
from miles.errors import MilesError, RunError
from miles.runs.files import disk_errors, write_atomic

CLOCK_SECONDS = 30.0
"""How far the clocks of two nodes may be apart: deadlines and the ages of files would mean nothing."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What the head of an allocation starts."""

    step: str
    attempt: int
    claim: int
    nodes: tuple[str, ...]
    address: str
    """Of the head."""
    port: int
    """Where the trainer ranks meet. It changes when somebody else took it: then all ranks begin anew."""
    code: str
    time: float
    """Of the head's clock."""


@dataclass(frozen=True, slots=True)
class Over:
    """The work of this allocation has ended, or none was to be done."""

    exit_code: int


@dataclass(frozen=True, slots=True)
class Failure:
    """How a rank ended that did not end well."""

    name: str
    kind: str
    """Class in `miles.errors`."""
    message: str
    fix: str | None
    explained: bool
    """Whether it said so itself; else it was found dead."""
    killed: bool
    """By a signal."""

    def error(self) -> MilesError:
        return error_of(self.kind, self.message, self.fix)


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node as it sees itself."""

    index: int
    node: str
    beat: int
    """How often it has reported."""
    time: float
    """Of its clock."""
    code: str
    port: int
    """Where its ranks meet, as far as it knows."""
    ranks: Literal["running", "finished", "ended"]
    """Ended: none runs any more, and not all ended well."""
    engines_came_up: bool = False
    signalled: bool = False
    """Whether it was asked to stop."""
    failures: tuple[Failure, ...] = ()
    error: Failure | None = None
    """What ended the supervision of this node, other than its ranks."""
    gone: bool = False
    """Whether all its processes have ended, and it ends as well."""


def write_launch(path: Path, launch: Launch | Over) -> None:
    """Replace the head's word. Raises RunError."""
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    write_atomic(path, json.dumps(asdict(launch)) + "\n")


def read_launch(path: Path) -> Launch | Over | None:
    """The head's word; None while there is none."""
    record = _read(path)
    if record is None:
        return None
    return Over(**record) if "exit_code" in record else Launch(**record | {"nodes": tuple(record["nodes"])})


def write_report(directory: Path, report: NodeReport) -> None:
    """Replace a node's report. Raises RunError."""
    with disk_errors(directory):
        directory.mkdir(exist_ok=True)
    write_atomic(directory / f"{report.index}.json", json.dumps(asdict(report)) + "\n", durable=False)


def read_report(directory: Path, index: int) -> NodeReport | None:
    """The newest report of a node; None while there is none."""
    record = _read(directory / f"{index}.json")
    if record is None:
        return None
    error = record.pop("error")
    failures = tuple(Failure(**failure) for failure in record.pop("failures"))
    return replace(NodeReport(**record), failures=failures, error=None if error is None else Failure(**error))


def failure_of(name: str, error: MilesError, *, explained: bool = True, killed: bool = False) -> Failure:
    """An error as it travels in a report, as the nearest class that `miles.errors` has."""
    kind = next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return Failure(name, kind, error.message, error.fix, explained, killed)


def error_of(kind: str, message: str, fix: str | None) -> MilesError:
    """An error that came in a report."""
    error: MilesError = getattr(errors, kind)(message, fix=fix)
    return error


def code_version() -> str:
    """Version of Miles and digest of its source files, which every node of a run must have in common."""
    digest = xxhash.xxh3_64()
    root = Path(miles.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return f"{miles.__version__}+{digest.hexdigest()}"


def refusal(launch: Launch, report: NodeReport, now: float) -> RunError | None:
    """Why a node cannot take part; None: it can. `now`: time of the head's clock, when it read the report.

    Files take their time from node to node, which is nobody's clock's fault: a clock is found ahead by what it wrote
    before it was read here, and behind by what it wrote after it had read the launch.
    """
    if report.code != launch.code:
        return RunError(
            f"node {report.node} runs Miles {report.code}, the head {launch.nodes[0]} runs {launch.code}",
            fix="install the same Miles on all nodes, best once on a shared file system",
        )
    ahead, behind = report.time - now, launch.time - report.time
    if max(ahead, behind) > CLOCK_SECONDS:
        off = f"{ahead:.0f} s ahead of" if ahead > behind else f"{behind:.0f} s behind"
        return RunError(
            f"the clock of node {report.node} is {off} that of {launch.nodes[0]} (at most {CLOCK_SECONDS:.0f} s)",
            fix=f'have its clock set (chrony, ntp), or leave it out: slurm.extra = {{exclude = "{report.node}"}}',
        )
    return None


def cause(failures: list[Failure]) -> Failure | None:
    """Of ranks that failed, because of each other or not, the one to believe; None: all of them ended as agreed.

    Who explains is believed first, then who was killed: the others only lost their peer.
    """
    errors_first = [failure for failure in failures if failure.kind != "Interrupted"]
    return min(errors_first, key=lambda failure: (not failure.explained, not failure.killed), default=None)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return record
