"""Taking a stage of a run back to an earlier checkpoint or to its beginning.

Owns which stage and step a person means, and what follows for the steps after it. Moving files belongs to
`miles.runs.rewind`.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.config.schema import RunConfig
from miles.errors import ConfigError, RunError, did_you_mean
from miles.runs.checkpoints import CheckpointStore
from miles.runs.claim import Claim, Fence
from miles.runs.paths import RunPaths
from miles.runs.rewind import rewind
from miles.workflow.graph import needed_steps, order_steps
from miles.workflow.stage import STAGES, read_state

BEGINNING = "start"


@dataclass(frozen=True, slots=True)
class GoingBack:
    """A stage that is to go on from an earlier step."""

    stage: str
    step: int
    """The checkpoint that it goes on from; 0: its beginning."""
    stages_after: list[str]
    """Stages made from its output, which begin again."""
    steps_after: list[str]
    """All steps made from its output, which run again."""
    set_aside: list[str]
    """What moves into discarded/ and what runs again, a line each."""


def parse_step(text: str) -> int:
    """`40`, `step-000040` or `start` (0). Raises ConfigError."""
    number = text.removeprefix("step-")
    if text == BEGINNING:
        return 0
    if not (number.isdecimal() and number.isascii()):
        raise ConfigError(f"--from {text}: neither a step nor '{BEGINNING}'", fix="for example --from step-000040")
    return int(number)


def stage_names(config: RunConfig) -> list[str]:
    """The steps that have checkpoints, in the order in which they run."""
    return [name for name in order_steps(config) if config.steps[name].kind in STAGES]


def choose_stage(paths: RunPaths, config: RunConfig, name: str | None) -> str:
    """The stage that a person means: the named one, or the last that has trained anything.

    Raises RunError.
    """
    names = stage_names(config)
    if name is None:
        trained = [stage for stage in names if read_state(paths, stage).step]
        if trained:
            return trained[-1]
        raise RunError(
            f"run '{paths.root.name}' has no trained step to go on from",
            fix=f"`miles resume {paths.root.name}` without --from starts what is to do",
        )
    if name not in names:
        raise RunError(
            f"run '{paths.root.name}' has no stage '{name}'." + did_you_mean(name, names),
            fix=f"its stages are {', '.join(names)}" if names else "it has no step of kind sft or rl",
        )
    return name


def plan_going_back(paths: RunPaths, config: RunConfig, stage: str, step: int) -> GoingBack:
    """What going back to `step` (0: the beginning) means. Raises RunError when there is no such intact checkpoint."""
    if step:
        CheckpointStore(paths, stage, Fence(paths, None)).require(step)
    state = read_state(paths, stage)
    after = [name for name in steps_after(config, stage) if paths.step(name).exists() or read_state(paths, name).step]
    lines = []
    if state.step > step:
        lines.append(f"training steps {step + 1} to {state.step} of '{stage}'")
    lines += [f"the outputs of '{name}', which was made from '{stage}'" for name in after]
    stages = [name for name in after if config.steps[name].kind in STAGES]
    return GoingBack(stage, step, stages, after, lines)


def go_back(paths: RunPaths, plan: GoingBack) -> None:
    """Set aside what the plan says. Raises RunError when a live process drives the run."""
    with Claim.acquire(paths):
        # A step counts as done no longer before anything of it moves; the last steps go first.
        for name in (*reversed(plan.steps_after), plan.stage):
            paths.done(name).unlink(missing_ok=True)
        for name in reversed(plan.stages_after):
            rewind(paths, name, 0)
        rewind(paths, plan.stage, plan.step)


def steps_after(config: RunConfig, name: str) -> list[str]:
    """Steps that need a step, or need one that does, in the order in which they run."""
    found = {name}
    for step in order_steps(config):
        if found & set(needed_steps(config.steps[step])):
            found.add(step)
    return [step for step in order_steps(config) if step in found - {name}]


def steps_before(config: RunConfig, name: str) -> list[str]:
    """Steps that a step needs, and those that they need, in the order in which they run."""
    return [step for step in order_steps(config) if name in steps_after(config, step)]
