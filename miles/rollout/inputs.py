"""What a rollout reads before it starts: the step's model directory, graders and prompts, checked together.

Owns the bound of a prompt's length and the match of prompts and graders. Engines are not asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.config.schema import DataSection, EvalStep, RlStep
from miles.data.inputs import ModelInput, open_model, resolved
from miles.data.prompts import load_prompts
from miles.data.sample import Prompt
from miles.rewards.grader import Grader, build_grader
from miles.runs.paths import RunPaths


@dataclass(frozen=True, slots=True)
class RolloutInputs:
    """The inputs of one `rl` or `eval` step. Close the grader when done."""

    model: ModelInput
    grader: Grader
    prompts: list[Prompt]
    """Empty for an `eval` step."""
    heldout: list[Prompt]
    """Empty where nothing is evaluated."""


def open_inputs(step: RlStep | EvalStep, paths: RunPaths) -> RolloutInputs:
    """Read and check everything. Raises DataError."""
    model = open_model(step.model, paths)
    grader = build_grader(step.rewards)

    def load(data: DataSection | None) -> list[Prompt]:
        return [] if data is None else graded_prompts(step, resolved(data, paths), model, grader)

    return RolloutInputs(model, grader, load(step.data if isinstance(step, RlStep) else None), load(step.eval.data))


def graded_prompts(step: RlStep | EvalStep, data: DataSection, model: ModelInput, grader: Grader) -> list[Prompt]:
    """The prompts of one file, each with room for a response and with what the graders need. Raises DataError."""
    prompts = load_prompts(data, model.tokenizer, max_prompt_tokens=_room(step, model))
    grader.check(prompts)
    return prompts


def _room(step: RlStep | EvalStep, model: ModelInput) -> int:
    """Tokens that the longest response leaves for a prompt, in the engine's context and in a micro-batch."""
    bounds = [model.context_length]
    if step.engine.context_length is not None:
        bounds.append(step.engine.context_length)
    if isinstance(step, RlStep):
        bounds.append(step.train.max_tokens_per_micro_batch)
    return min(bounds) - step.rollout.max_response_tokens
