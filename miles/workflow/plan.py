"""Which steps of a run are still to do, in which order, and why."""

from __future__ import annotations

from dataclasses import dataclass

from miles.config.schema import RunConfig
from miles.runs.paths import RunPaths
from miles.workflow.done import Done, damaged_outputs, read_done
from miles.workflow.fingerprint import Inputs, inputs_of
from miles.workflow.graph import order_steps


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of the plan."""

    name: str
    kind: str
    inputs: Inputs
    done: Done | None
    """Its record when the step need not run; None: it is to do."""
    why: str
    """Why it is to do; empty when it is done."""


def plan_run(config: RunConfig, paths: RunPaths) -> list[PlannedStep]:
    """All steps in the order in which they run."""
    plan: list[PlannedStep] = []
    fingerprints: dict[str, str] = {}
    for name in order_steps(config):
        inputs = inputs_of(config, name, fingerprints)
        fingerprints[name] = inputs.fingerprint
        record = read_done(paths, name)
        damaged = damaged_outputs(paths, name, record) if record else []
        why = why_to_do(inputs, record, damaged)
        plan.append(PlannedStep(name, config.steps[name].kind, inputs, None if why else record, why))
    return plan


def why_to_do(inputs: Inputs, record: Done | None, damaged: list[str]) -> str:
    """Why a step has to run, given its record and the damaged outputs; empty: it need not."""
    if record is None:
        return "not done yet"
    if difference := inputs.difference(record.inputs):
        return difference
    if damaged:
        return f"output {damaged[0]} is missing or damaged"
    return ""
