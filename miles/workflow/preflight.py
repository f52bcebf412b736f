"""A look at the user's own inputs before a run begins: data files, tokenizers, weights, graders.

    python -m miles.workflow.preflight --run-dir D --config DIR --steps NAME ...

A process of its own, because a tokenizer takes seconds to import and graders are foreign code. Looks at what is there
before any step has run; what a `tiny-task` step is still to build is checked by the steps that read it.
Owns which step is checked for what; the checks are those that the steps themselves make.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from miles.config.load import dump_resolved, load_resolved
from miles.config.schema import DataSection, EvalStep, ModelSection, RlStep, RunConfig, SftStep
from miles.config.steps import referred
from miles.errors import DataError
from miles.runs.failures import exit_with_failures
from miles.runs.paths import STEP_PREFIX, RunPaths
from miles.workflow.child import run_child

CheckedStep = SftStep | RlStep | EvalStep


def check_inputs(config: RunConfig, paths: RunPaths, names: Iterable[str]) -> None:
    """Check the inputs of the named steps in a process of its own, which writes nothing into the run.

    Raises DataError with every step's first problem.
    """
    wanted = [name for name in names if has_own_inputs(config, name)]
    if not wanted:
        return
    with tempfile.TemporaryDirectory(prefix="miles-") as directory:
        (Path(directory) / "run.toml").write_text(dump_resolved(config), encoding="utf-8")
        arguments = ["--run-dir", str(paths.root), "--config", directory, "--steps", *wanted]
        run_child("miles.workflow.preflight", arguments, "the check of prompts, models and graders")


def check_all_inputs(runs: Iterable[tuple[RunConfig, RunPaths, Sequence[str]]]) -> None:
    """Check the inputs of the named steps of several runs; runs that read the same are looked at once.

    Raises DataError with the first run's problems.
    """
    seen: set[str] = set()
    for config, paths, names in runs:
        wanted = [name for name in names if has_own_inputs(config, name)]
        read = json.dumps([what_is_read(config, name) for name in wanted])
        if wanted and read not in seen:
            check_inputs(config, paths, wanted)
            seen.add(read)


def what_is_read(config: RunConfig, name: str) -> list[Any]:
    """All that the check of one step depends on."""
    step = config.steps[name]
    assert isinstance(step, CheckedStep)
    model = first_model(step, config)
    read = {"kind", "model", "data", "rewards", "rollout", "engine", "eval"}
    longest = None if isinstance(step, EvalStep) else step.train.max_tokens_per_micro_batch
    return [name, step.model_dump(mode="json", include=read), model and model.model_dump(mode="json"), longest]


def has_own_inputs(config: RunConfig, name: str) -> bool:
    """Whether a step reads anything of the user's that can be checked before the run: a file, a model, a grader."""
    step = config.steps[name]
    if not isinstance(step, CheckedStep):
        return False
    own_graders = not isinstance(step, SftStep) and any(reward.grader != "exact" for reward in step.rewards)
    return own_graders or first_model(step, config) is not None or any(map(_is_own, _data_of(step)))


def first_model(step: CheckedStep, config: RunConfig) -> ModelSection | None:
    """The step's model as far as it exists before the run: `step:NAME/model` keeps the tokenizer of what NAME trains.

    None where a step builds it from nothing.
    """
    model = step.model
    while model.path.startswith(STEP_PREFIX):
        source = config.steps[referred(model.path)[0]]
        if not isinstance(source, SftStep | RlStep):
            return None
        model = model.model_copy(update={"path": source.model.path})
    own_tokenizer = model.tokenizer is None or not model.tokenizer.startswith(STEP_PREFIX)
    return model if own_tokenizer else None


def check_step(step: CheckedStep, config: RunConfig, paths: RunPaths) -> None:
    """Raise DataError for the first thing that is wrong with the inputs of one step. Quick looks come first."""
    _check_rows_and_graders(step)
    model = first_model(step, config)
    if model is None:
        return

    from miles.data.inputs import open_demonstrations, open_model
    from miles.data.template import Renderer
    from miles.models.checkpoint import check_weights
    from miles.rollout.inputs import open_inputs

    opened = open_model(model, paths)
    for data in _data_of(step):
        Renderer(data, opened.tokenizer)
    check_weights(opened.directory)
    if not all(map(_is_own, _data_of(step))):
        return
    step = step.model_copy(update={"model": model})
    if isinstance(step, SftStep):
        open_demonstrations(step, paths)
    else:
        open_inputs(step, paths).grader.close()


def _check_rows_and_graders(step: CheckedStep) -> None:
    """What needs neither a tokenizer nor torch."""
    from miles.data.prompts import read_demonstration_rows, read_prompt_rows

    for data in filter(_is_own, _data_of(step)):
        if isinstance(step, SftStep):
            read_demonstration_rows(data)
        else:
            read_prompt_rows(data)
    if not isinstance(step, SftStep):
        from miles.rewards.grader import build_grader

        build_grader(step.rewards).close()


def _data_of(step: CheckedStep) -> list[DataSection]:
    """The data files that a step reads."""
    sections = [] if isinstance(step, EvalStep) else [step.data]
    if not isinstance(step, SftStep) and step.eval.data is not None:
        sections.append(step.eval.data)
    return sections


def _is_own(data: DataSection) -> bool:
    return not data.path.startswith(STEP_PREFIX)


def _collect(checks: dict[str, Callable[[], None]]) -> None:
    """Run the checks by step name; raise what they found as one DataError."""
    found: dict[str, DataError] = {}
    for name, check in checks.items():
        try:
            check()
        except DataError as error:
            found[name] = error
    if len(found) == 1:
        ((name, only),) = found.items()
        raise DataError(f"step '{name}': {only.message}", fix=only.fix)
    if found:
        problems = "\n".join(f"step '{name}': {problem}" for name, problem in found.items())
        raise DataError(f"{len(found)} steps cannot run:\n{problems}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the run is, or will be")
    parser.add_argument("--config", type=Path, required=True, help="directory with the resolved run.toml")
    parser.add_argument("--steps", nargs="+", required=True)
    arguments = parser.parse_args()

    config = load_resolved(arguments.config)
    paths = RunPaths(arguments.run_dir)

    def checking(name: str) -> Callable[[], None]:
        step = config.steps[name]
        assert isinstance(step, CheckedStep), f"step '{name}' reads no inputs of the user's"
        return lambda: check_step(step, config, paths)

    _collect({name: checking(name) for name in arguments.steps})


if __name__ == "__main__":
    exit_with_failures(main)
