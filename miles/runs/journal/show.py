"""What a journal holds, as rows for people: steps, and the groups of one step.

Reads only: the run may be live, damaged files stay where they are, and no prompts file is needed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from miles.data.sample import Group, Sample
from miles.errors import RunError, did_you_mean
from miles.runs.files import disk_errors
from miles.runs.journal.codec import Content, content_batch, decode, prompt_finder
from miles.runs.journal.deltas import Replay
from miles.runs.journal.files import list_files, newest_batch, read_file, step_directories
from miles.runs.journal.journal import replay_segment
from miles.runs.manifest import DamagedError
from miles.runs.paths import RunPaths


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One group of a step. Lists have one element per sample."""

    position: int
    prompt_id: str
    epoch: int
    staleness: int
    """Steps since it was drawn."""
    fate: str
    """`trained`, `carried`, or `open` while the step has no decision."""
    rewards: list[float | None]
    lengths: list[int]
    """Response tokens."""
    finish_reasons: list[str | None]
    weight_versions: list[int]
    """All that took part, ascending."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of the journal."""

    step: int
    decided: bool
    """False: it is open, what follows is what its segments hold."""
    trained: int
    carried: int
    open: int
    """Groups."""
    dropped: dict[str, int]
    """Groups, by reason."""
    tokens: int
    """Response tokens of the groups trained on; of all groups while the step is open."""
    off_policy_tokens: int
    """Those of them sampled by other weights than the newest before the step."""
    bytes: int
    """Of the files that count."""
    bytes_per_token: float | None
    """Over the response tokens of all groups in the files, the carried ones too."""
    segments: int
    """While the step is open."""
    damaged: list[str]
    """Names of damaged files with what is wrong."""


@dataclass(frozen=True, slots=True)
class StepView:
    """One step in full."""

    row: StepRow
    groups: list[GroupRow]


def find_stage(paths: RunPaths, stage: str | None) -> str:
    """The stage whose journal is meant; None: the only one. Raises RunError naming those that there are."""
    root = paths.journal("x").parent
    with disk_errors(root, "read"):
        stages = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.exists() else []
    name = paths.root.name
    if not stages:
        raise RunError(f"run '{name}' has no journal", fix="reinforcement-learning steps write one as they generate")
    if stage is None and len(stages) == 1:
        return stages[0]
    known = ", ".join(stages)
    if stage is None:
        raise RunError(f"run '{name}' has the journals of {known}", fix=f"say which: --stage {stages[-1]}")
    if stage not in stages:
        raise RunError(
            f"run '{name}' has no journal of '{stage}'.{did_you_mean(stage, stages)}", fix=f"choose one of {known}"
        )
    return stage


def show_steps(paths: RunPaths, stage: str) -> list[StepRow]:
    """All steps of a stage's journal, ascending."""
    return [_view(step, directory).row for step, directory in step_directories(paths.journal(stage)).items()]


def show_step(paths: RunPaths, stage: str, step: int) -> StepView:
    """One step. Raises RunError naming the steps that there are when it is not one of them."""
    directories = step_directories(paths.journal(stage))
    if step not in directories:
        there = f"steps {min(directories)} to {max(directories)}" if directories else "no steps"
        raise RunError(
            f"the journal of '{stage}' has no step {step}; it has {there}",
            fix='`miles journal show` lists them; journal.keep = "all" keeps all of a run',
        )
    return _view(step, directories[step])


def _view(step: int, directory: Path) -> StepView:
    damaged = [file.path.name for kind in ("batch", "segment") for file in list_files(directory, kind) if file.damaged]
    batch = newest_batch(directory)
    files = [batch] if batch is not None else [file for file in list_files(directory, "segment") if not file.damaged]
    contents, size = [], 0
    for file in files:
        try:
            data = read_file(file)
            contents.append(decode(data, file.path.name))
            size += len(data)
        except DamagedError as error:
            damaged.append(error.message)
    decided = batch is not None and bool(contents)
    groups = _decided(contents[0]) if decided else _open(contents)
    dropped = {each.position: each.reason for content in contents for each in content.dropped}
    row = _step_row(step, decided, groups, dict(Counter(dropped.values())), size, len(files), damaged)
    return StepView(row, [_group_row(group, fate, step) for fate, group in groups])


def _decided(content: Content) -> list[tuple[str, Group]]:
    batch = content_batch(content, prompt_finder(None))
    return [("trained", group) for group in batch.groups] + [("carried", group) for group in batch.carried]


def _open(contents: list[Content]) -> list[tuple[str, Group]]:
    replay = Replay(prompt_finder(None))
    for content in contents:
        replay_segment(replay, content)
    return sorted((("open", group) for _, group in replay.finish()), key=lambda each: each[1].position)


def _step_row(
    step: int,
    decided: bool,
    groups: list[tuple[str, Group]],
    dropped: dict[str, int],
    size: int,
    files: int,
    damaged: list[str],
) -> StepRow:
    fates = Counter(fate for fate, _ in groups)
    counted = [sample for fate, group in groups if fate != "carried" for sample in group.samples]
    tokens = sum(len(sample.response_tokens) for sample in counted)
    everything = sum(len(sample.response_tokens) for _, group in groups for sample in group.samples)
    return StepRow(
        step=step,
        decided=decided,
        trained=fates["trained"],
        carried=fates["carried"],
        open=fates["open"],
        dropped=dropped,
        tokens=tokens,
        off_policy_tokens=sum(_off_policy(sample, step) for sample in counted),
        bytes=size,
        bytes_per_token=size / everything if everything else None,
        segments=0 if decided else files,
        damaged=damaged,
    )


def _off_policy(sample: Sample, step: int) -> int:
    return len(sample.weight_versions) - sample.weight_versions.count(step - 1)


def _group_row(group: Group, fate: str, step: int) -> GroupRow:
    return GroupRow(
        position=group.position,
        prompt_id=group.prompt.id,
        epoch=group.epoch,
        staleness=step - group.born,
        fate=fate,
        rewards=[sample.reward for sample in group.samples],
        lengths=[len(sample.response_tokens) for sample in group.samples],
        finish_reasons=[sample.finish_reason for sample in group.samples],
        weight_versions=sorted({version for sample in group.samples for version in sample.weight_versions}),
    )
