"""What each kind of step needs in processes. Owns the table; who starts the processes is `miles.cluster`."""

from __future__ import annotations

from dataclasses import dataclass

from miles.config.schema import EngineSection, EvalStep, LocalSection, ReportStep, RlStep, SftStep, TinyTaskStep

AnyStep = TinyTaskStep | SftStep | RlStep | EvalStep | ReportStep


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one step on one node."""

    module: str
    """Python module of the ranks, or of the single process."""
    role: str
    """`trainer` for torch.distributed ranks, `step` for a process of its own; the name of its log."""
    ranks: int
    engines: int
    engine_module: str
    local: LocalSection
    engine: EngineSection


def processes_of(step: AnyStep) -> Processes:
    """The processes of a resolved step."""
    match step:
        case RlStep():
            return _ranks(step.local, step.local.ranks, step.local.engines, step.engine)
        case SftStep():
            return _ranks(step.local, step.local.ranks, engines=0, engine=EngineSection())
        case EvalStep():
            return _ranks(step.local, 1, step.local.engines, step.engine)
        case TinyTaskStep() | ReportStep():
            return Processes("miles.workflow.run_step", "step", 1, 0, "", LocalSection(), EngineSection())


def _ranks(local: LocalSection, ranks: int, engines: int, engine: EngineSection) -> Processes:
    return Processes("miles.training.worker", "trainer", ranks, engines, "miles.engines.serve", local, engine)
