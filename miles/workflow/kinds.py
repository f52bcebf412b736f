"""What each kind of step needs in processes, and which of them a node runs. Owns the table; who starts the processes is
`miles.cluster`.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.config.schema import EngineSection, EvalStep, LocalSection, ReportStep, RlStep, SftStep, TinyTaskStep

AnyStep = TinyTaskStep | SftStep | RlStep | EvalStep | ReportStep


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one step on each of its nodes."""

    module: str
    """Python module of the ranks, or of the single process."""
    role: str
    """`trainer` for torch.distributed ranks, `step` for a process of its own; the name of its log."""
    ranks: int
    engines: int
    engine_module: str
    local: LocalSection
    engine: EngineSection
    every_node: bool = True
    """Whether every node runs ranks; else the head alone does."""

    def share(self, node: int, nodes: int) -> Share:
        """What one of `nodes` nodes runs."""
        world = self.ranks * nodes if self.every_node else self.ranks
        return Share(
            ranks=range(min(world, node * self.ranks), min(world, (node + 1) * self.ranks)),
            world=world,
            engines=range(node * self.engines, (node + 1) * self.engines),
        )


@dataclass(frozen=True, slots=True)
class Share:
    """Indices of the ranks and engines of one node, among those of all nodes."""

    ranks: range
    world: int
    """Ranks of all nodes."""
    engines: range


def processes_of(step: AnyStep) -> Processes:
    """The processes of a resolved step."""
    match step:
        case RlStep():
            return _ranks(step.local, step.local.ranks, step.local.engines, step.engine)
        case SftStep():
            return _ranks(step.local, step.local.ranks, engines=0, engine=EngineSection())
        case EvalStep():
            return _ranks(step.local, 1, step.local.engines, step.engine, every_node=False)
        case TinyTaskStep() | ReportStep():
            local, engine = LocalSection(), EngineSection()
            return Processes("miles.workflow.run_step", "step", 1, 0, "", local, engine, every_node=False)


def _ranks(
    local: LocalSection, ranks: int, engines: int, engine: EngineSection, *, every_node: bool = True
) -> Processes:
    worker, server = "miles.training.worker", "miles.engines.serve"
    return Processes(worker, "trainer", ranks, engines, server, local, engine, every_node)
