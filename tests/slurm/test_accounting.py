"""A cluster with accounting (slurmdbd): what Miles tells about a job that the controller has forgotten.

Runs where the packages are installed (accounting.py names them).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from miles.cluster.checks import Status
from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.site_checks import read_site, site_checks
from miles.cluster.slurm.states import JobState
from slurm.accounting import PACKAGES, accounting_installed
from slurm.conftest import become_user
from slurm.daemons import until
from slurm.testbed import Testbed
from slurm.user import User

RUN_FILE = """
name = "proof"
runs_dir = "{directory}/runs"

[slurm]
setup = ['[ -n "${{SLURM_RESTART_COUNT-}}" ] || {{ scontrol requeue "$SLURM_JOB_ID"; sleep 60; }}', "exit 7"]

[steps.prepare]
kind = "tiny-task"
"""


@pytest.fixture
def bed(slurm_clusters: Callable[..., Testbed], monkeypatch: pytest.MonkeyPatch) -> Testbed:
    """A cluster with accounting whose controller forgets a job seconds after its end."""
    if not accounting_installed(f"{os.environ['PATH']}:/usr/sbin"):
        missing = f"accounting is not installed: apt-get install --no-install-recommends {PACKAGES}"
        warnings.warn(f"the tests of accounting do not run. {missing}", stacklevel=1)
        pytest.skip(missing)
    bed = slurm_clusters(nodes=1, accounting=True, extra=["MinJobAge=2"])
    become_user(bed, monkeypatch)
    return bed


def told_by_doctor() -> Status:
    """What the doctor thinks of the accounting."""
    (check,) = (check for check in site_checks(read_site(Slurm())) if check.name == "accounting")
    return check.status


def test_a_job_that_is_forgotten_is_told_by_the_accounting(bed: Testbed, tmp_path: Path) -> None:
    user = User(tmp_path, bed)
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE.format(directory=tmp_path))
    user.miles("submit", str(file))
    job = user.job()
    assert until(lambda: not Slurm().jobs([job]), 120), "the controller does not forget it"
    assert Slurm().show(job) is None
    assert until(lambda: [run.state for run in Slurm().accounted([job], strict=True).get(job, [])][1:] != [], 30)
    requeued, failed = Slurm().accounted([job])[job]
    assert (requeued.state, failed.state, failed.exit_code) == (JobState.REQUEUED, JobState.FAILED, 7)
    assert f"job {job} of prepare: REQUEUED, then FAILED (by Slurm's accounting)" in user.miles("explain", "proof")
    assert user.status()["state"] == "pending"
    assert told_by_doctor() is Status.OK

    bed.stop_accounting()
    try:
        assert Slurm().accounted([job]) == {}
        assert f"job {job} of prepare: not known to Slurm any more" in user.miles("explain", "proof")
        assert told_by_doctor() is Status.WARN
    finally:
        bed.up()
