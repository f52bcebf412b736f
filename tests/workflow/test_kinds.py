import importlib.util

import pytest

from miles.config.schema import (
    DataSection,
    EngineSection,
    EvalSection,
    EvalStep,
    LocalSection,
    ModelSection,
    ReportStep,
    RlStep,
    SftStep,
    TinyTaskStep,
)
from miles.workflow.kinds import AnyStep, processes_of

MODEL, DATA = ModelSection(path="/m"), DataSection(path="/d.jsonl")
LOCAL = LocalSection(ranks=2, engines=3)
STEPS: list[tuple[AnyStep, str, int, int]] = [
    (TinyTaskStep(kind="tiny-task"), "step", 1, 0),
    (ReportStep(kind="report"), "step", 1, 0),
    (SftStep(kind="sft", model=MODEL, data=DATA, local=LOCAL), "trainer", 2, 0),
    (RlStep(kind="rl", model=MODEL, data=DATA, local=LOCAL), "trainer", 2, 3),
    (EvalStep(kind="eval", model=MODEL, eval=EvalSection(data=DATA), local=LOCAL), "trainer", 1, 3),
]


@pytest.mark.parametrize(("step", "role", "ranks", "engines"), STEPS)
def test_kind_has_its_processes(step: AnyStep, role: str, ranks: int, engines: int) -> None:
    processes = processes_of(step)
    assert (processes.role, processes.ranks, processes.engines) == (role, ranks, engines)
    assert importlib.util.find_spec(processes.module) is not None
    assert not engines or importlib.util.find_spec(processes.engine_module) is not None


def test_engines_are_as_the_step_says() -> None:
    step = RlStep(kind="rl", model=MODEL, data=DATA, engine=EngineSection(startup_timeout=7.0))
    assert processes_of(step).engine.startup_timeout == 7.0
