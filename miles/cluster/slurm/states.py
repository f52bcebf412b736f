"""Jobs as Slurm describes them: states, and what squeue, scontrol and sacct print.

Owns the parsing, for every version from 22.05 on; runs no command. A word that is not known gives UNKNOWN or None,
never an error: a new version of Slurm must not end a run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from miles.cluster.slurm.ids import Element, JobId


class JobState(StrEnum):
    """State of a job as Slurm names it: a base state, or the flag that qualifies it."""

    # Base states: the job waits, has nodes, or has ended.
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUSPENDED = "SUSPENDED"
    COMPLETED = "COMPLETED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"
    TIMEOUT = "TIMEOUT"
    NODE_FAIL = "NODE_FAIL"
    PREEMPTED = "PREEMPTED"
    BOOT_FAIL = "BOOT_FAIL"
    DEADLINE = "DEADLINE"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    # Flags, in the order in which Slurm lets one of them hide the base state.
    COMPLETING = "COMPLETING"
    STAGE_OUT = "STAGE_OUT"
    CONFIGURING = "CONFIGURING"
    POWER_UP_NODE = "POWER_UP_NODE"
    RESIZING = "RESIZING"
    EXPEDITING = "EXPEDITING"
    REQUEUED = "REQUEUED"
    REQUEUE_FED = "REQUEUE_FED"
    REQUEUE_HOLD = "REQUEUE_HOLD"
    SPECIAL_EXIT = "SPECIAL_EXIT"
    LAUNCH_FAILED = "LAUNCH_FAILED"
    RECONFIG_FAIL = "RECONFIG_FAIL"
    STOPPED = "STOPPED"
    REVOKED = "REVOKED"
    RESV_DEL_HOLD = "RESV_DEL_HOLD"
    SIGNALING = "SIGNALING"
    UPDATE_DB = "UPDATE_DB"
    UNKNOWN = "UNKNOWN"

    @classmethod
    def parse(cls, text: str | Sequence[str]) -> JobState:
        """The state in what any command of any version prints.

        `CANCELLED by 1000` and `CANCELLED+` (sacct), `PD` (squeue, compact), `CANCELLED,COMPLETING` and lists (24.05
        and later). Of several, the flag that Slurm itself shows; one that is not known does not hide the base state.
        """
        words = text.split(",") if isinstance(text, str) else list(text)
        found = {_state(word) for word in words}
        flags = [state for state in _FLAGS if state in found]
        if flags:
            return flags[0]
        return next((state for state in cls if state in found and state is not cls.UNKNOWN), cls.UNKNOWN)

    @property
    def ended(self) -> bool:
        """Whether the job is over and will not run again by itself."""
        return self in _ENDED

    @property
    def live(self) -> bool:
        """Whether the job waits, runs, or may run again. Of an unknown state the worse is assumed: that it does."""
        return self not in _ENDED

    @property
    def waiting(self) -> bool:
        """Whether the job has no nodes, and may get some."""
        return self in _WAITING


_ENDED = frozenset(
    {
        JobState.COMPLETED,
        JobState.CANCELLED,
        JobState.FAILED,
        JobState.TIMEOUT,
        JobState.NODE_FAIL,
        JobState.PREEMPTED,
        JobState.BOOT_FAIL,
        JobState.DEADLINE,
        JobState.OUT_OF_MEMORY,
        JobState.REVOKED,
        JobState.UPDATE_DB,
    }
)
_WAITING = frozenset(
    {
        JobState.PENDING,
        JobState.REQUEUED,
        JobState.REQUEUE_FED,
        JobState.REQUEUE_HOLD,
        JobState.SPECIAL_EXIT,
        JobState.LAUNCH_FAILED,
        JobState.RESV_DEL_HOLD,
        JobState.EXPEDITING,
    }
)
_ALL = list(JobState)
_FLAGS = _ALL[_ALL.index(JobState.COMPLETING) : _ALL.index(JobState.UPDATE_DB)]
# UPDATE_DB is left out of the flags: it only says that the accounting has yet to hear of the base state.
_COMPACT = {
    "PD": JobState.PENDING,
    "R": JobState.RUNNING,
    "S": JobState.SUSPENDED,
    "CD": JobState.COMPLETED,
    "CA": JobState.CANCELLED,
    "F": JobState.FAILED,
    "TO": JobState.TIMEOUT,
    "NF": JobState.NODE_FAIL,
    "PR": JobState.PREEMPTED,
    "BF": JobState.BOOT_FAIL,
    "DL": JobState.DEADLINE,
    "OOM": JobState.OUT_OF_MEMORY,
    "CG": JobState.COMPLETING,
    "CF": JobState.CONFIGURING,
    "RS": JobState.RESIZING,
    "RD": JobState.RESV_DEL_HOLD,
    "RF": JobState.REQUEUE_FED,
    "RH": JobState.REQUEUE_HOLD,
    "RQ": JobState.REQUEUED,
    "RV": JobState.REVOKED,
    "SI": JobState.SIGNALING,
    "SE": JobState.SPECIAL_EXIT,
    "SO": JobState.STAGE_OUT,
    "ST": JobState.STOPPED,
}
# Older spellings, and those of job_state in the output of the programming interface.
_OTHER = {"REQUEUE": JobState.REQUEUED, "OOM": JobState.OUT_OF_MEMORY, "NODE_FAILED": JobState.NODE_FAIL}


def _state(word: str) -> JobState:
    name = word.strip().split(" ")[0].rstrip("+").upper()
    if name in JobState.__members__:
        return JobState[name]
    return _COMPACT.get(name) or _OTHER.get(name) or JobState.UNKNOWN


@dataclass(frozen=True, slots=True)
class Job:
    """One job, or one run of it (sacct). Times in Unix seconds; None: not known, none, or without limit."""

    id: int
    """Its number, `SLURM_JOB_ID`; of an element that waits in its array still, the number of the array."""
    state: JobState
    reason: str = ""
    """Why it waits, or ended (`Priority`, `Resources`, `Dependency`, `BeginTime`, ...); empty: no reason."""
    restarts: int = 0
    partition: str = ""
    nodes: tuple[str, ...] = ()
    """Its nodes, in Slurm's order; empty while it waits."""
    node_count: int = 0
    submitted: float | None = None
    start: float | None = None
    """When it began; of a waiting job: when Slurm expects it to."""
    end_limit: float | None = None
    """When its time limit ends it, or when it ended."""
    preempted: float | None = None
    """When it was last preempted, where Slurm says so."""
    exit_code: int | None = None
    """Of its batch script."""
    exit_signal: int | None = None
    """Signal that ended its batch script."""
    element: Element | None = None
    """Which element of which array it is; None: no array's."""

    @property
    def name(self) -> JobId:
        """What Slurm's commands call it."""
        return self.id if self.element is None else self.element


SQUEUE_FIELDS = (
    "JobID",
    "ArrayJobID",
    "ArrayTaskID",
    "State",
    "RestartCnt",
    "Partition",
    "NumNodes",
    "SubmitTime",
    "StartTime",
    "EndTime",
    "PreemptTime",
    "exit_code",
    "NodeList",
    "Reason",
)
SQUEUE_FORMAT = ",".join(f"{field}:|" for field in SQUEUE_FIELDS)
"""For `squeue -O`: no width, so that nothing is cut off, and a separator after each. No field holds a user's text."""

SACCT_FIELDS = (
    *("JobIDRaw", "JobID", "State", "Partition", "NNodes", "Submit", "Start", "End", "ExitCode", "NodeList", "Reason"),
)
SACCT_FORMAT = ",".join(SACCT_FIELDS)
"""For `sacct -P`."""


def parse_squeue(text: str) -> list[Job]:
    """Jobs in the output of `squeue -h -r -O SQUEUE_FORMAT`: every element of an array by itself."""
    return [
        _job(
            fields,
            id=fields["JobID"],
            state=fields["State"],
            submitted=fields["SubmitTime"],
            start=fields["StartTime"],
            end=fields["EndTime"],
            nodes=fields["NodeList"],
            count=fields["NumNodes"],
            exit_code=fields["exit_code"],
            element=_element(fields["ArrayJobID"], fields["ArrayTaskID"]),
        )
        for fields in _rows(text, SQUEUE_FIELDS)
    ]


def parse_sacct(text: str) -> list[Job]:
    """Runs of jobs in the output of `sacct -n -P -D -X -o SACCT_FORMAT`, oldest first; steps are left out."""
    return [
        _job(
            fields,
            id=fields["JobIDRaw"],
            state=fields["State"],
            submitted=fields["Submit"],
            start=fields["Start"],
            end=fields["End"],
            nodes=fields["NodeList"],
            count=fields["NNodes"],
            exit_code=fields["ExitCode"],
            element=_element(*fields["JobID"].partition("_")[::2]),
        )
        for fields in _rows(text, SACCT_FIELDS)
    ]


def _rows(text: str, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """The lines that begin with a job's id, as named fields; `|` stands between them, and may stand in the last."""
    for line in text.splitlines():
        values = [value.strip() for value in line.split("|", len(names) - 1)]
        if len(values) == len(names) and values[0].isdecimal():
            yield dict(zip(names, values, strict=True))


def parse_scontrol_job(text: str) -> Job | None:
    """The first job in the output of `scontrol -o show job`; None where there is none."""
    # The name is the user's: nothing before the id of the user, which follows it, is looked at.
    found = re.match(
        r"\s*JobId=(\d+) (?:ArrayJobId=(\d+) ArrayTaskId=(\d+) )?(?:.*? )??JobName=.* UserId=\S+\(\d+\) (.*)", text
    )
    if found is None:
        return None
    fields = key_values(found[4])
    return _job(
        fields,
        id=found[1],
        state=fields.get("JobState", ""),
        submitted=fields.get("SubmitTime", ""),
        start=fields.get("StartTime", ""),
        end=fields.get("EndTime", ""),
        nodes=fields.get("NodeList", ""),
        count=fields.get("NumNodes", ""),
        exit_code=fields.get("ExitCode", ""),
        element=_element(found[2] or "", found[3] or ""),
    )


def _job(
    fields: dict[str, str],
    *,
    id: str,
    state: str,
    submitted: str,
    start: str,
    end: str,
    nodes: str,
    count: str,
    exit_code: str,
    element: Element | None = None,
) -> Job:
    code, signal = _exit_code(exit_code)
    reason = fields.get("Reason", "").rstrip("|").strip()
    return Job(
        id=int(id),
        state=JobState.parse(state),
        reason="" if reason in ("None", "(null)", "N/A") else reason,
        restarts=_number(fields.get("RestartCnt", fields.get("Restarts", ""))) or 0,
        partition=fields.get("Partition", ""),
        nodes=expand_nodes(nodes),
        node_count=_number(count.split("-")[0]) or 0,
        submitted=unix_time(submitted),
        start=unix_time(start),
        end_limit=unix_time(end),
        preempted=unix_time(fields.get("PreemptTime", "")),
        exit_code=code,
        exit_signal=signal,
        element=element,
    )


def key_values(line: str) -> dict[str, str]:
    """`Key=value` words of a line of scontrol, the first of each key; values end at a space."""
    values: dict[str, str] = {}
    for word in line.split():
        key, separator, value = word.partition("=")
        if separator:
            values.setdefault(key, value)
    return values


def unix_time(text: str) -> float | None:
    """Unix seconds of a time as Slurm prints it, local or in seconds; None where it says that there is none."""
    if text.isdecimal():
        return float(text)
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def duration(text: str) -> int | None:
    """Seconds of `D-HH:MM:SS`, `HH:MM:SS` or `MM:SS`; None for UNLIMITED and whatever else is no duration."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def expand_nodes(text: str) -> tuple[str, ...]:
    """The names in a list of nodes: `n[1-2,07],login` is n1, n2, n07, login."""
    if text in ("", "(null)", "N/A", "None", "None assigned"):
        return ()
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names += _expand(part)
    return tuple(names)


def _expand(part: str) -> list[str]:
    found = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if found is None:
        return [part]
    head, ranges, tail = found.groups()
    names = []
    for piece in ranges.split(","):
        first, _, last = piece.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            return [part]
        for number in range(int(first), int(last or first) + 1):
            names += [f"{head}{number:0{len(first)}d}{rest}" for rest in _expand(tail)]
    return names


def _exit_code(text: str) -> tuple[int | None, int | None]:
    """Code and signal of `7:0` (scontrol, sacct) or of a wait status, 1792 (squeue)."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if found is None:
        return None, None
    if found[2] is None:
        return int(found[1]) >> 8, int(found[1]) & 0x7F or None
    return int(found[1]), int(found[2]) or None


def _element(array: str, index: str) -> Element | None:
    """An element; of a job that is none, the index is `N/A`."""
    return Element(int(array), int(index)) if array.isdecimal() and index.isdecimal() else None


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
