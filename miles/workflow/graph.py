"""The order of a run's steps, from what each needs. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from miles.config.schema import RunConfig
from miles.runs.paths import STEP_PREFIX
from miles.workflow.kinds import AnyStep


def needed_steps(step: AnyStep) -> list[str]:
    """Steps that must be done before this one: its `needs`, and every step it refers to, each once."""
    referred = (text.removeprefix(STEP_PREFIX).partition("/")[0] for text in _references(step.model_dump()))
    return list(dict.fromkeys([*step.needs, *referred]))


def order_steps(config: RunConfig) -> list[str]:
    """All steps, each after those it needs, otherwise in the order of the file.

    Needs that do not exist or go in a circle are the loader's to refuse (`miles.config`).
    """
    needs = {name: set(needed_steps(step)) for name, step in config.steps.items()}
    order: list[str] = []
    while len(order) < len(needs):
        ready = next((name for name in needs if name not in order and needs[name] <= set(order)), None)
        assert ready is not None, f"steps need each other in a circle, or steps that do not exist: {needs}"
        order.append(ready)
    return order


def _references(value: Any) -> Iterator[str]:
    """Every `step:NAME/file` among nested tables and lists."""
    if isinstance(value, str):
        if value.startswith(STEP_PREFIX):
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
