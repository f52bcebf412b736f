"""What must be true of a run that has ended well, whatever happened to it on the way.

Owns the comparison with an undisturbed run of the same run file. Returns findings as sentences; none means that the
proof holds.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import xxhash
from safetensors.numpy import load_file

from miles.data.sample import Group
from miles.runs.checkpoints import CheckpointStore
from miles.runs.claim import Fence
from miles.runs.journal import Batch, read_batch
from miles.runs.journal.files import newest_batch, step_directories
from miles.runs.metrics import MetricsLine, read_metrics
from miles.runs.paths import RunPaths
from tests.chaos.run import STAGE, WARMUP, remains

STAGES = (WARMUP, STAGE)
END_SECONDS = 30.0
"""How long a process may outlive the driver."""
NOT_COMPARED = ("time/", "rollout/generated_tokens", "rollout/resumed_tokens", "rollout/discarded_tokens")
"""Prefixes of metrics that say what something cost: those of a step that was interrupted differ."""

Tensors = dict[str, str]
"""xxh3 of each tensor's bytes by file and name."""


def audit(paths: RunPaths, reference: RunPaths) -> list[str]:
    """Everything that differs from the undisturbed run, or that is wrong in itself."""
    return [
        *weight_findings(paths, reference),
        *journal_findings(paths, reference),
        *metric_findings(paths, reference),
        *checkpoint_findings(paths),
        *process_findings(paths),
        *log_findings(paths),
    ]


def weights(paths: RunPaths, stage: str = STAGE) -> Tensors:
    """Checksums of the tensors of a stage's model."""
    files = sorted((paths.step(stage) / "model").glob("*.safetensors"))
    return {
        f"{file.name}/{name}": xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tensor).data)
        for file in files
        for name, tensor in load_file(file).items()
    }


def weight_findings(paths: RunPaths, reference: RunPaths, stages: tuple[str, ...] = STAGES) -> list[str]:
    """Tensors of the final models that are not the same bits."""
    findings = []
    for stage in stages:
        mine, other = weights(paths, stage), weights(reference, stage)
        if not other:
            findings.append(f"the undisturbed run has no model of {stage}")
        differing = sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))
        if differing:
            findings.append(f"{stage}: {len(differing)} of {len(other)} tensors differ, the first is {differing[0]}")
    return findings


def read_journal(paths: RunPaths) -> dict[int, Batch]:
    """The decisions of all steps. Nothing is changed, not even what is damaged."""
    files = {step: newest_batch(directory) for step, directory in step_directories(paths.journal(STAGE)).items()}
    return {step: read_batch(file.path, None) for step, file in files.items() if file is not None}


def journal_findings(paths: RunPaths, reference: RunPaths) -> list[str]:
    """Draws that were lost or used twice, and batches that are not those of the undisturbed run."""
    mine, other = read_journal(paths), read_journal(reference)
    findings = draw_findings(mine)
    if mine.keys() != other.keys():
        findings.append(f"the journal has steps {sorted(mine)}; undisturbed {sorted(other)}")
    for step in sorted(mine.keys() & other.keys()):
        findings += [f"journal, step {step}: {text}" for text in _batch_findings(mine[step], other[step])]
    return findings


def draw_findings(batches: dict[int, Batch]) -> list[str]:
    """Whether every position of the draws was trained on once, dropped once, or is carried at the end."""
    findings: list[str] = []
    if sorted(batches) != list(range(1, len(batches) + 1)):
        return [f"the journal's steps are not 1..{len(batches)}: {sorted(batches)}"]
    cursor = 0
    uses: Counter[int] = Counter()
    for step, batch in sorted(batches.items()):
        if batch.step != step:
            findings.append(f"the batch of step {step} says it is of step {batch.step}")
        if batch.cursor < cursor:
            findings.append(f"step {step}: the cursor goes back from {cursor} to {batch.cursor}")
        cursor = batch.cursor
        uses.update(group.position for group in batch.groups)
        uses.update(dropped.position for dropped in batch.dropped)
        carried = [group.position for group in batch.carried]
        missing = sorted(set(range(cursor)) - uses.keys() - set(carried))
        twice = sorted([position for position, count in (uses + Counter(carried)).items() if count > 1])
        beyond = sorted(position for position in [*uses, *carried] if position >= cursor)
        for positions, what in ((missing, "lost"), (twice, "used twice"), (beyond, "never drawn")):
            if positions:
                findings.append(f"after step {step}, positions {what}: {positions}")
    return findings


def _batch_findings(mine: Batch, other: Batch) -> Iterator[str]:
    if mine.cursor != other.cursor:
        yield f"cursor {mine.cursor}, undisturbed {other.cursor}"
    dropped, other_dropped = ([(each.position, each.reason) for each in batch.dropped] for batch in (mine, other))
    if sorted(dropped) != sorted(other_dropped):
        yield f"dropped {dropped}, undisturbed {other_dropped}"
    for what, groups, others in (("trained", mine.groups, other.groups), ("carried", mine.carried, other.carried)):
        positions, other_positions = ([group.position for group in each] for each in (groups, others))
        if positions != other_positions:
            yield f"{what} positions {positions}, undisturbed {other_positions}"
            continue
        for group, twin in zip(groups, others, strict=True):
            yield from (f"{what} position {group.position}: {text}" for text in _group_findings(group, twin))


def _group_findings(mine: Group, other: Group) -> Iterator[str]:
    for name in ("epoch", "born"):
        if getattr(mine, name) != getattr(other, name):
            yield f"{name} {getattr(mine, name)}, undisturbed {getattr(other, name)}"
    for sample, twin in zip(mine.samples, other.samples, strict=True):
        for name in ("seed", "response_tokens", "log_probs", "loss_mask", "weight_versions", "finish_reason", "reward"):
            if getattr(sample, name) != getattr(twin, name):
                yield f"sample {sample.index}: {name} differ"
        if not np.array_equal(_routes(sample.routed_experts), _routes(twin.routed_experts)):
            yield f"sample {sample.index}: routed experts differ"


def _routes(routes: np.ndarray | None) -> np.ndarray:
    return np.empty(0) if routes is None else routes


def metric_findings(paths: RunPaths, reference: RunPaths, stages: tuple[str, ...] = STAGES) -> list[str]:
    """Steps that are missing, repeated or out of order in metrics.jsonl, and values that differ."""
    findings = []
    for stage in stages:
        mine, other = ([line for line in read_metrics(each) if line.stage == stage] for each in (paths, reference))
        steps, other_steps = ([line.step for line in lines] for lines in (mine, other))
        if steps != other_steps or steps != list(range(steps[0], len(steps) + steps[0])):
            findings.append(f"metrics of {stage} are of steps {steps}; undisturbed {other_steps}")
            continue
        for line, twin in zip(mine, other, strict=True):
            values, other_values = _compared(line), _compared(twin)
            for name in sorted(values.keys() | other_values.keys()):
                if values.get(name) != other_values.get(name):
                    was = other_values.get(name)
                    findings.append(f"metrics of {stage} {line.step}: {name} is {values.get(name)}, undisturbed {was}")
    return findings


def _compared(line: MetricsLine) -> dict[str, str]:
    """The values as text: every bit of a float, and NaN equal to itself."""
    return {name: repr(value) for name, value in line.values.items() if not name.startswith(NOT_COMPARED)}


def checkpoint_findings(paths: RunPaths, stages: tuple[str, ...] = STAGES) -> list[str]:
    """Checkpoints that do not verify, and drafts that were left behind."""
    findings = []
    for stage in stages:
        store = CheckpointStore(paths, stage, Fence(paths, None))
        if not store.steps():
            findings.append(f"{stage} has no checkpoint")
        findings += [f"{stage}, checkpoint {step}: {text}" for step in store.steps() for text in store.damage(step)]
        drafts = [*paths.checkpoints(stage).glob(".*"), *paths.journal(stage).rglob(".*")]
        findings += [f"left behind: {path}" for path in sorted(drafts)]
    return findings


def process_findings(paths: RunPaths) -> list[str]:
    """Processes that outlived the run. PyTorch's manager of shared memory ends by itself, seconds after its clients."""
    deadline = time.monotonic() + END_SECONDS
    while (found := remains(paths)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return [f"still runs: process {pid}, {command}" for pid, command in found.items()]


LOG_FINDING = "a traceback in "
LOST_NEIGHBOUR = re.compile(
    r"^(?:\[rank\d+\]: )?RuntimeError: .*gloo.*(?:Connection closed by peer|Connection reset)", re.M
)


def log_findings(paths: RunPaths) -> list[str]:
    """Errors that no user should see: the stack of a program, in any log of any attempt.

    Except of a rank whose neighbour was killed, and which says so: gloo raises where it happens to wait.
    """
    logs = [log for log in (paths.driver_log, *sorted(paths.all_logs.glob("attempt-*/*.log"))) if log.exists()]
    return [f"{LOG_FINDING}{log}" for log in logs if _stacks(log.read_text(errors="replace"))]


def _stacks(text: str) -> int:
    return text.count("Traceback") - len(LOST_NEIGHBOUR.findall(text))
