from miles.config.schema import DataSection, ModelSection, ReportStep, RunConfig, SftStep, TinyTaskStep
from miles.workflow.graph import needed_steps, order_steps
from miles.workflow.kinds import AnyStep


def _sft(model: str, data: str, needs: list[str] | None = None) -> SftStep:
    return SftStep(kind="sft", model=ModelSection(path=model), data=DataSection(path=data), needs=needs or [])


def _order(steps: dict[str, AnyStep]) -> list[str]:
    return order_steps(RunConfig(name="demo", steps=steps))


def test_step_needs_what_it_names_and_what_it_refers_to() -> None:
    step = _sft("step:warmup/model", "step:prepare/train.jsonl", needs=["check", "warmup"])
    assert needed_steps(step) == ["check", "warmup", "prepare"]
    assert needed_steps(_sft("/models/qwen", "/data/a.jsonl")) == []


def test_steps_run_after_those_they_need() -> None:
    steps: dict[str, AnyStep] = {
        "report": ReportStep(kind="report", needs=["second"]),
        "second": _sft("step:first/model", "step:prepare/train.jsonl"),
        "first": _sft("step:prepare/model", "step:prepare/train.jsonl"),
        "prepare": TinyTaskStep(kind="tiny-task"),
    }
    assert _order(steps) == ["prepare", "first", "second", "report"]


def test_independent_steps_keep_the_order_of_the_file() -> None:
    names = ["b", "a", "c"]
    assert _order({name: TinyTaskStep(kind="tiny-task") for name in names}) == names
