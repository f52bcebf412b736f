"""A run that is killed again and again ends with the same bits as one that is not. More of it: `make chaos`."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest

from tests.chaos.audit import audit, draw_findings, read_journal
from tests.chaos.kills import Blow, Kind, Life, Plan, torment
from tests.chaos.run import Case, Undisturbed, finish, paths_of
from tests.chaos.shim import Shim

CASE = Case("megatron", partial=True, steps=6, checkpoint_every=2, eval_every=3)


class Listed(Plan):
    """Blows of these kinds in this order; the moments are random."""

    def __init__(self, kinds: list[Kind], seed: int) -> None:
        super().__init__(seed, 0.0)
        self._kinds = cycle(kinds)

    def next(self) -> Blow:
        return replace(super().next(), kind=next(self._kinds), live=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return finish(CASE.write(tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.mark.timeout(600)
def test_killed_run_ends_with_the_same_bits(undisturbed: Undisturbed, tmp_path: Path) -> None:
    file = CASE.write(tmp_path / "run")
    kinds = [Kind.ENGINE, Kind.RANK, Kind.ALL, Kind.WRITE]
    plan = Listed(kinds, seed=1)
    lives = torment(file, plan, shim=Shim(tmp_path / "shim", paths_of(file).root), max_kills=len(kinds))
    assert audit(paths_of(file), undisturbed.paths) == []
    assert len(_blows(lives)) >= 2


def _blows(lives: list[Life]) -> list[Kind]:
    return [kill.kind for life in lives for kill in life.kills]


def test_audit_sees_a_lost_draw_and_one_used_twice(undisturbed: Undisturbed) -> None:
    batches = read_journal(undisturbed.paths)
    assert draw_findings(batches) == []
    last = batches[max(batches)]
    lost = batches | {last.step: replace(last, groups=last.groups[1:])}
    assert "lost: [" in draw_findings(lost)[0]
    twice = batches | {last.step: replace(last, groups=[*last.groups, batches[1].groups[0]])}
    assert "used twice: [" in draw_findings(twice)[0]
