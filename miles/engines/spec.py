"""What a run's config says about one engine of one step. Owns no process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miles.config.load import load_resolved
from miles.config.schema import EngineSection, EvalStep, RlStep
from miles.errors import ConfigError, did_you_mean
from miles.runs.paths import RunPaths


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine of a step, resolved."""

    model: Path
    tokenizer: Path
    trust_remote_code: bool
    dtype: str
    """`float32`, `bfloat16`, or `auto`: the model's own"""
    engine: EngineSection
    index: int
    host: str
    port: int


def engine_spec(paths: RunPaths, step_name: str, *, index: int, host: str, port: int) -> EngineSpec:
    """What the run's config says about the engines of a step; ConfigError when the step has none."""
    steps = load_resolved(paths.root).steps
    if step_name not in steps:
        raise ConfigError(f"the run has no step '{step_name}'.{did_you_mean(step_name, steps)}")
    step = steps[step_name]
    if not isinstance(step, RlStep | EvalStep):
        raise ConfigError(f"step '{step_name}' is of kind {step.kind}, which has no engines")
    dtype = step.engine.dtype or (step.train.dtype if isinstance(step, RlStep) else "auto")
    model = paths.resolve(step.model.path)
    return EngineSpec(
        model=model,
        tokenizer=paths.resolve(step.model.tokenizer) if step.model.tokenizer else model,
        trust_remote_code=step.model.trust_remote_code,
        dtype=str(dtype),
        engine=step.engine,
        index=index,
        host=host,
        port=port,
    )
