"""`miles doctor` and `miles init --site` on a real cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from miles.config.load import load_run
from slurm.conftest import become_user
from slurm.testbed import Testbed

REPOSITORY = Path(__file__).parents[2]


def miles(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miles", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_doctor_tells_what_the_cluster_does(slurm: Testbed, tmp_path: Path) -> None:
    done = miles(tmp_path, "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout)
    told = {name: [check["message"] for check in checks if check["name"] == name] for name in ("preemption", "requeue")}
    assert told["preemption"] == [
        f"jobs of low are requeued {slurm.grace} s after a signal (killed {slurm.kill_wait} s later)",
        f"jobs of kill are cancelled when they are preempted, {slurm.grace} s after a signal",
        "jobs of high are not preempted",
    ]
    assert told["requeue"] == ["a job that is put back into the queue waits 6 s before it may start"]
    assert list(tmp_path.iterdir()) == []


def test_doctor_sees_the_signal_before_preemption_and_the_forbidden_requeue(
    slurm_clusters: Callable[..., Testbed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_user(slurm_clusters(nodes=1, send_user_signal=True, requeue=False), monkeypatch)
    lines = miles(tmp_path, "doctor").stdout
    assert "with the signal of --signal" in lines
    assert "JobRequeue=0" in lines


def test_doctor_fails_while_the_controller_is_away(
    slurm_clusters: Callable[..., Testbed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = slurm_clusters(nodes=1)
    become_user(bed, monkeypatch)
    bed.stop_controller()
    done = miles(tmp_path, "doctor")
    assert done.returncode == 1
    assert "fail slurm" in done.stdout


def test_site_profile_is_written_once_and_a_run_file_extends_it(slurm: Testbed, tmp_path: Path) -> None:
    done = miles(tmp_path, "init", "--site")
    assert done.returncode == 0, done.stderr
    profile = tmp_path / "sites" / "testbed.toml"
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        'extends = ["preset:cpu", "sites/testbed.toml"]\nname = "demo"\n[slurm]\nnodes = 2\n'
        '[steps.prepare]\nkind = "tiny-task"\n'
    )
    section = load_run(run_file, []).steps["prepare"].slurm
    assert (section.partition, section.gpus_per_node, section.nodes, section.restart) == ("low", 8, 2, "requeue")
    before = profile.read_text()
    assert miles(tmp_path, "init", "--site").returncode == 4
    assert profile.read_text() == before
