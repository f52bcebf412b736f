"""The checks of `miles doctor`: sites that no test can build, a real directory, what commands of others print."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest

from miles.cluster.checks import Check, Status
from miles.cluster.disk_checks import CLOCK_SECONDS, clock, disk_checks, file_system, read_quota, room
from miles.cluster.doctor import examine, gpu_driver, offline, open_files
from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.site import NodeGroup, Partition
from miles.cluster.slurm.site_checks import Site, own_variables, site_checks

GPU = Partition("gpu", True, True, 172800, 3600, 16, 40, 1, "REQUEUE", 120)
SITE = Site(
    version=(24, 11),
    config={
        "ClusterName": "big",
        "JobRequeue": "1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "AccountingStorageType": "accounting_storage/slurmdbd",
    },
    partitions=[GPU],
    nodes=[NodeGroup("gpu", 40, "mix", 96, 1000000, {"h100": 4})],
)


def the(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def with_config(**settings: str) -> list[Check]:
    return list(site_checks(replace(SITE, config=SITE.config | settings)))


def test_site_without_surprises_is_all_ok() -> None:
    checks = list(site_checks(SITE))
    assert {check.status for check in checks} == {Status.OK}
    assert the(checks, "partition").message == (
        "gpu: default, 40 nodes with 4 GPUs (h100), limit 2-00:00:00 (01:00:00 unless asked), at most 16 nodes a job"
    )
    assert the(checks, "gpus").message == "types for slurm.gpu_type: h100"
    assert "requeued 120 s after a signal" in the(checks, "preemption").message
    assert "waits 121 s" in the(checks, "requeue").message  # the default life of a credential, and one second


def test_every_warning_says_what_to_do() -> None:
    broken = replace(
        SITE,
        version=(20, 11),
        config=SITE.config | {"RequeueExit": "70-80", "PreemptMode": "CANCEL"},
        partitions=[replace(GPU, default=False, up=False, preempt_mode="CANCEL")],
        nodes=[],
        accounting="sacct: connection refused",
    )
    checks = list(site_checks(broken))
    warned = [check.name for check in checks if check.status is Status.WARN]
    assert warned == ["slurm", "partition", "partitions", "gpus", "exit-codes", "preemption", "accounting"]
    assert all(check.remedy for check in checks if check.status is Status.WARN)


def test_partition_whose_nodes_are_all_down_is_named() -> None:
    down = replace(SITE, nodes=[NodeGroup("gpu", 40, "down*", 96, 1000000, {"h100": 4})])
    assert "none of its nodes works" in the(list(site_checks(down)), "partition").message


def test_no_partition_is_a_failure() -> None:
    assert the(list(site_checks(replace(SITE, partitions=[]))), "partitions").status is Status.FAIL


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"SlurmctldParameters": "idle_on_node_suspend,preempt_send_user_signal"}, "with the signal of --signal"),
        ({"PreemptParameters": "send_user_signal,youngest_first"}, "with the signal of --signal"),
        ({}, "with SIGTERM"),
    ],
)
def test_signal_that_precedes_preemption(settings: dict[str, str], told: str) -> None:
    assert told in the(with_config(**settings), "user-signal").message


@pytest.mark.parametrize(
    ("mode", "status"),
    [("REQUEUE", Status.OK), ("CANCEL", Status.WARN), ("SUSPEND,GANG", Status.WARN), ("OFF", Status.OK)],
)
def test_mode_of_preemption(mode: str, status: Status) -> None:
    checks = list(site_checks(replace(SITE, partitions=[replace(GPU, preempt_mode=mode)])))
    assert the(checks, "preemption").status is status


def test_site_that_preempts_nobody_and_keeps_no_accounts() -> None:
    checks = with_config(
        PreemptType="preempt/none", AccountingStorageType="accounting_storage/none", MinJobAge="300 sec"
    )
    assert the(checks, "preemption").message == "no job is preempted here"
    assert the(checks, "user-signal").status is Status.SKIP
    assert "forgets a job 300 s after" in the(checks, "accounting").message


def test_variables_of_sbatch_are_named() -> None:
    check = own_variables({"SBATCH_ACCOUNT": "a", "SBATCH_PARTITION": "b", "HOME": "/"})
    assert (check.status, "SBATCH_ACCOUNT, SBATCH_PARTITION" in check.message) == (Status.WARN, True)


def test_directory_that_does_not_exist_yet_is_judged_by_its_parent_and_left_clean(tmp_path: Path) -> None:
    checks = list(disk_checks(tmp_path / "runs" / "later"))
    tried = ("directory", "atomic-rename", "exclusive-create", "fsync", "clock")
    assert {the(checks, name).status for name in tried} <= {Status.OK, Status.WARN}
    assert str(tmp_path) in the(checks, "directory").message
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_written_is_a_failure() -> None:
    (check,) = disk_checks(Path("/proc/self"))
    assert (check.name, check.status) == ("directory", Status.FAIL)


def test_file_system_is_that_of_the_innermost_mount() -> None:
    mounts = "/dev/a / ext4 rw 0 0\nserver:/x /scratch nfs4 rw 0 0\ntmpfs /scratch/my\\040tmp tmpfs rw 0 0\n"
    assert file_system(Path("/scratch/runs"), mounts) == ("/scratch", "nfs4")
    assert file_system(Path("/scratch/my tmp/x"), mounts) == ("/scratch/my tmp", "tmpfs")
    assert file_system(Path("/scratchy"), mounts) == ("/", "ext4")


def test_clocks_that_differ_are_told() -> None:
    now = time.time()
    assert clock(now, now - 0.1, now + 0.1).status is Status.OK
    late = clock(now + CLOCK_SECONDS + 60, now, now)
    assert (late.status, "62 s" in late.message) == (Status.WARN, True)


@pytest.mark.parametrize(("free", "status"), [(2**20, Status.FAIL), (2**34, Status.WARN), (2**40, Status.OK)])
def test_free_space(tmp_path: Path, free: int, status: Status) -> None:
    inodes = os.statvfs(tmp_path)
    assert room(tmp_path, free, inodes).status is status


def test_quota_that_is_used_up_is_a_failure() -> None:
    head = "Disk quotas for user me (uid 1000): \n  Filesystem   space   quota   limit   grace   files\n"
    row = "server:/home  {}    20G     22G            100\n"
    assert read_quota(head + "  " + row.format("12G")).message == "server:/home: 12G of 22G"
    assert read_quota(head + "  " + row.format("23G*")).status is Status.FAIL
    assert read_quota("").status is Status.OK


def test_few_open_files_come_with_the_line_that_raises_them() -> None:
    assert open_files(1024).remedy == 'slurm.setup = ["ulimit -n 4096"]'
    assert open_files(resource.RLIM_INFINITY).status is Status.OK


def test_proxy_between_our_own_processes_is_told() -> None:
    assert offline({"https_proxy": "http://p:1"}).status is Status.WARN
    assert offline({"https_proxy": "http://p:1", "no_proxy": "localhost, 10.0.0.0/8"}).status is Status.OK
    assert "HF_HUB_OFFLINE" in offline({"HF_HUB_OFFLINE": "1"}).message


def test_driver_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for script, status in (("echo 'NVIDIA H100, 570.1, 81559 MiB'", Status.OK), ("echo broken; exit 9", Status.FAIL)):
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        assert gpu_driver().status is status


def test_machine_without_slurm_is_examined_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = list(examine(tmp_path))
    assert (checks[0].name, checks[0].status) == ("slurm", Status.SKIP)
    assert not [check for check in checks if check.status is Status.FAIL]


def test_controller_that_does_not_answer_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, script in (("sbatch", "echo slurm 23.02.7"), ("scontrol", "exec sleep 60")):
        (tmp_path / program).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    first = next(examine(tmp_path, Slurm(timeout=0.3, patience=0)))
    assert (first.name, first.status) == ("slurm", Status.FAIL)
