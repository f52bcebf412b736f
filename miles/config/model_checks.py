"""What a step's model allows: families, heads, layers and experts to divide, context length.

Reads `config.json` as plain JSON, no torch. A `step:` reference is followed to the model that the step begins
with; a model that a `tiny-task` step builds is known by that step's keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.config.problems import Finding
from miles.config.schema import (
    Backend,
    EngineSection,
    EvalStep,
    RlStep,
    SftStep,
    StepBase,
    TinyTaskStep,
    TrainSection,
)
from miles.config.steps import referred
from miles.models.families import MEGATRON_FAMILIES, context_length


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of a model that decide what is possible; None where the directory does not say."""

    family: str
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    experts: int = 0
    """0 for a dense model."""
    context_length: int | None = None


def model_findings(step: StepBase, steps: dict[str, StepBase]) -> Iterator[Finding]:
    """Values of one step that its model does not allow; nothing where the model cannot be known yet."""
    if not isinstance(step, SftStep | RlStep | EvalStep):
        return
    facts = model_facts(step.model.path, steps)
    if facts is None:
        return
    if isinstance(step, SftStep | RlStep):
        yield from _division(step.train, facts)
    if isinstance(step, RlStep | EvalStep):
        yield from _engine(step.engine, facts)
        yield from _context(step, facts)


def model_facts(reference: str, steps: dict[str, StepBase]) -> ModelFacts | None:
    """Facts of the model that a path or `step:` reference names, or None where they cannot be read."""
    seen: set[str] = set()
    while reference.startswith("step:"):
        name = referred(reference)[0]
        step = steps.get(name)
        if isinstance(step, TinyTaskStep):
            experts = step.experts if step.architecture == "qwen3-moe" else 0
            return ModelFacts(step.architecture.replace("-", "_"), layers=step.layers, experts=experts)
        if name in seen or not isinstance(step, SftStep | RlStep):
            return None
        seen.add(name)
        reference = step.model.path
    try:
        config = json.loads((Path(reference) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # reported by `miles.config.file_checks`
    return _facts(config) if isinstance(config, dict) else None


def _facts(config: dict[str, Any]) -> ModelFacts:
    def number(*names: str) -> int | None:
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)

    heads = number("num_attention_heads")
    return ModelFacts(
        family=str(config.get("model_type", "")),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads") or heads,
        experts=number("num_experts", "num_local_experts", "n_routed_experts") or 0,
        context_length=context_length(config),
    )


def _division(train: TrainSection, facts: ModelFacts) -> Iterator[Finding]:
    if train.backend is Backend.FSDP:
        return
    if facts.family not in MEGATRON_FAMILIES:
        yield Finding(
            (("train", "backend"), ("model", "path")),
            f'train.backend = "megatron" does not know model_type "{facts.family}" '
            f"(it knows {', '.join(MEGATRON_FAMILIES)})",
            'set train.backend = "fsdp", which trains most other causal language models of transformers',
        )
        return
    divisions = (
        ("tensor_parallel_size", facts.heads, "attention heads"),
        ("tensor_parallel_size", facts.kv_heads, "key/value heads"),
        ("pipeline_parallel_size", facts.layers, "layers"),
        ("expert_parallel_size", facts.experts, "experts"),
    )
    for key, count, what in divisions:
        size = getattr(train, key)
        if size > 1 and count == 0:
            message = f"train.{key} = {size}, but the model has no {what}"
            yield Finding((("train", key),), message, f"set train.{key} to 1")
        elif count is not None and count % size:
            divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            message = f"train.{key} = {size} does not divide the model's {count} {what}"
            yield Finding((("train", key),), message, f"set train.{key} to one of {divisors}")


def _engine(engine: EngineSection, facts: ModelFacts) -> Iterator[Finding]:
    if engine.return_routed_experts and not facts.experts:
        yield Finding(
            (("engine", "return_routed_experts"),),
            "engine.return_routed_experts = true, but the model has no experts",
            "set engine.return_routed_experts to false",
        )
    if facts.context_length is not None and (engine.context_length or 0) > facts.context_length:
        yield Finding(
            (("engine", "context_length"),),
            f"engine.context_length = {engine.context_length} exceeds the model's {facts.context_length}",
            f"set engine.context_length to at most {facts.context_length}, or remove it",
        )


def _context(step: RlStep | EvalStep, facts: ModelFacts) -> Iterator[Finding]:
    data, key = (step.data, "data") if isinstance(step, RlStep) else (step.eval.data, "eval.data")
    prompt = (data.max_prompt_tokens if data is not None else None) or 1
    longest = prompt + step.rollout.max_response_tokens
    if facts.context_length is not None and longest > facts.context_length:
        response = facts.context_length - prompt
        fix = (
            f"set rollout.max_response_tokens to at most {response}"
            if response > 0
            else f"lower {key}.max_prompt_tokens"
        )
        yield Finding(
            (("rollout", "max_response_tokens"), (*key.split("."), "max_prompt_tokens"), ("model", "path")),
            f"rollout.max_response_tokens = {step.rollout.max_response_tokens} with prompts of up to "
            f"{prompt} tokens does not fit the model's context of {facts.context_length} tokens",
            fix,
        )
