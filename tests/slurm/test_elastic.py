"""A run that begins on one node and goes on with two, because Slurm has them by then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from miles.runs.attempts import EndReason
from slurm.testbed import Testbed
from slurm.torment import stage_attempts
from slurm.user import User, curve_distance, unsound
from tests.chaos.run import Case

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOLERANCE = 1e-3
"""Of a metric, relative to its largest value: sums of float32 over other numbers of ranks. Over 30 steps on 2, 4, 3 and
1 ranks the gradient's norm was 1e-4 away, the loss 4e-6 (benchmarks/results/slurm-elastic.json)."""


def test_it_takes_the_nodes_that_there_are_and_keeps_its_curve(
    slurm_clusters: Callable[..., Testbed], tmp_path: Path
) -> None:
    user = User(tmp_path, slurm_clusters())
    file = user.write(Case("fsdp", steps=4, checkpoint_every=2, eval_every=0))
    user.miles("submit", str(file))
    user.until_state("done")

    paths = user.fork("grown", 'slurm.nodes="1-2"')
    others = user.bed.sbatch(
        "#!/bin/bash\nsleep 600\n", "-o", "/dev/null", "-p", "high", "--exclusive", "-N3", "-w", "n[2-4]"
    )
    user.bed.wait_state(others, "RUNNING")
    user.miles("resume", "grown")
    user.until_step(1, "grown")
    user.bed.run("scancel", others)
    user.bed.preempt(user.job("grown"))
    user.until_state("done", "grown")

    first, second = stage_attempts(paths)
    assert (first.reason, second.reason) == (EndReason.PREEMPTED, EndReason.FINISHED)
    assert first.place and len(first.place.nodes) == 1
    assert second.place and len(second.place.nodes) == 2
    assert second.note.endswith("now with 2 ranks on 2 nodes, before with 1 rank on 1")
    distances = curve_distance(paths, user.run())
    assert max(distances.values()) <= TOLERANCE, distances
    assert unsound(paths) == []
