"""What the commands of several versions of Slurm print, read back. Recorded lines are of the version that is named."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.cluster.slurm.ids import parse_job_id
from miles.cluster.slurm.site import NodeGroup, parse_config, parse_gpus, parse_node_groups, parse_partition
from miles.cluster.slurm.states import (
    SACCT_FIELDS,
    SQUEUE_FIELDS,
    Job,
    JobState,
    duration,
    expand_nodes,
    parse_sacct,
    parse_scontrol_job,
    parse_squeue,
    unix_time,
)

ENDED = "COMPLETED CANCELLED FAILED TIMEOUT NODE_FAIL PREEMPTED BOOT_FAIL DEADLINE OUT_OF_MEMORY REVOKED UPDATE_DB"
WAITING = "PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT LAUNCH_FAILED RESV_DEL_HOLD EXPEDITING"
HAS_NODES = (
    "RUNNING SUSPENDED COMPLETING STAGE_OUT CONFIGURING POWER_UP_NODE RESIZING RECONFIG_FAIL STOPPED SIGNALING UNKNOWN"
)

# Slurm 24.11.5: running, in the grace of a preemption, put back into the queue; another one that ended with 7.
SQUEUE_24_11 = """\
1|1|N/A|RUNNING|0|low|2|1795404333|1795404334|1795407934|N/A|0:0|n[1-2]|None|
1|1|N/A|RUNNING|0|low|2|1795404333|1795404334|1795404338|1795404335|0:0|n[1-2]|None|
1|1|N/A|PENDING|1|low|2|1795404348|1795404354|1795407954|N/A|0:0||BeginTime|
3|3|N/A|FAILED|0|low|1|1795404354|1795404354|1795404354|N/A|7:0|n1|NonZeroExitCode|
"""
# Slurm 22.05.8: the exit code is a wait status; a job without limit; one that can never start.
SQUEUE_22_05 = """\
1|1|N/A|CANCELLED|0|low|2|1795403730|1795403731|1795403749|N/A|15|n[1-2]|None|
8|8|N/A|RUNNING|0|low|3|1795403918|1795403919|NONE|N/A|0|n[1-3]|None|
9|9|N/A|PENDING|0|low|9|1795403919|N/A|N/A|N/A|0||PartitionNodeLimit|
"""
# Slurm 22.05.8, an array with a throttle: two elements that wait in it, two that were taken out of it.
SQUEUE_ARRAY = """\
53|53|2|PENDING|0|low|1|1795403730|N/A|N/A|N/A|0||JobArrayTaskLimit|
53|53|3|PENDING|0|low|1|1795403730|N/A|N/A|N/A|0||JobArrayTaskLimit|
54|53|0|RUNNING|0|low|1|1795403730|1795403731|1795407331|N/A|0|n1|None|
55|53|1|PENDING|1|low|1|1795403730|1795403761|N/A|N/A|0||BeginTime|
"""
SCONTROL_22_05 = (
    "JobId=1 JobName=a b=c|d UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901759 Nice=0 Account=(null) "
    "QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0 "
    "RunTime=00:00:01 TimeLimit=01:00:00 TimeMin=N/A SubmitTime=2026-11-23T03:15:30 EligibleTime=2026-11-23T03:15:30 "
    "StartTime=2026-11-23T03:15:31 EndTime=2026-11-23T04:15:31 Deadline=N/A PreemptTime=None SuspendTime=None "
    "Partition=low ReqNodeList=(null) ExcNodeList=(null) NodeList=n[1-2] BatchHost=n1 NumNodes=2 NumCPUs=2 "
    "Command=(null) WorkDir=/tmp Comment=x y=z  StdErr=/dev/null StdIn=/dev/null StdOut=/dev/null Power= "
)
SCONTROL_24_11 = (
    "JobId=1 JobName=a b UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901757 Nice=0 Account=(null) "
    "QOS=(null) JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 "
    "ExitCode=0:0 RunTime=00:00:00 TimeLimit=01:00:00 TimeMin=N/A SubmitTime=1795404348 EligibleTime=1795404354 "
    "AccrueTime=1795404354 StartTime=1795404354 EndTime=1795407954 Deadline=N/A SuspendTime=None SecsPreSuspend=0 "
    "Partition=low AllocNode:Sid=localhost:11979 ReqNodeList=(null) ExcNodeList=(null) NodeList= NumNodes=2-2 "
    "NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqTRES=cpu=2,mem=200M,node=2,billing=2 AllocTRES=(null) Command=/tmp/s.sh"
)
# As the documentation of sacct has them, one line per run of a job that was preempted, and a cancelled one.
SACCT = """\
12|12|PREEMPTED|low|2|1795404333|1795404334|1795404348|0:9|n[1-2]|None
12|12|COMPLETED|low|2|1795404348|1795404354|1795404400|0:0|n[1-2]|None
12.batch|12.batch|COMPLETED||1|1795404348|1795404354|1795404400|0:0|n1|
13|13|CANCELLED by 1000|low|2|1795404348|Unknown|1795404400|0:0|None assigned|None
55|53_3|COMPLETED|low|1|1795404348|1795404354|1795404400|0:0|n1|None
53|53_4|PENDING|low|1|1795404348|Unknown|Unknown|0:0|None assigned|None
"""


def test_every_state_is_in_one_class() -> None:
    table = {state.value: (state.ended, state.waiting) for state in JobState}
    expected = dict.fromkeys(ENDED.split(), (True, False)) | dict.fromkeys(WAITING.split(), (False, True))
    assert table == expected | dict.fromkeys(HAS_NODES.split(), (False, False))
    assert all(state.live is not state.ended for state in JobState)


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("CANCELLED by 1000", JobState.CANCELLED),
        ("CANCELLED+", JobState.CANCELLED),
        ("PD", JobState.PENDING),
        ("OOM", JobState.OUT_OF_MEMORY),
        (["CANCELLED", "COMPLETING"], JobState.COMPLETING),
        ("PENDING,REQUEUED", JobState.REQUEUED),
        ("COMPLETED,UPDATE_DB", JobState.COMPLETED),
        (["RUNNING", "SOMETHING_NEW"], JobState.RUNNING),
        ("SOMETHING_NEW", JobState.UNKNOWN),
        ("", JobState.UNKNOWN),
        ([], JobState.UNKNOWN),
    ],
)
def test_state_in_any_spelling(text: str | list[str], state: JobState) -> None:
    assert JobState.parse(text) is state


@given(st.text())
def test_nothing_that_slurm_may_print_is_an_error(text: str) -> None:
    assert isinstance(JobState.parse(text), JobState)
    for parse in (parse_squeue, parse_sacct, parse_scontrol_job, parse_partition, parse_node_groups, parse_gpus):
        parse(text)
    parse_scontrol_job(f"JobId=1 JobName=x UserId=a(1) {text}")
    parse_squeue("|".join(["1", *[text.replace("|", "")] * (len(SQUEUE_FIELDS) - 1)]))
    parse_sacct("|".join(["1", *[text.replace("|", "")] * (len(SACCT_FIELDS) - 1)]))
    parse_partition(f"PartitionName={text}")
    parse_config(text)
    expand_nodes(text)
    duration(text)
    unix_time(text)


def test_squeue_of_24_11() -> None:
    running, grace, waiting, failed = parse_squeue(SQUEUE_24_11)
    assert running == Job(
        id=1,
        state=JobState.RUNNING,
        partition="low",
        nodes=("n1", "n2"),
        node_count=2,
        submitted=1795404333,
        start=1795404334,
        end_limit=1795407934,
        exit_code=0,
    )
    assert grace.preempted == 1795404335
    assert (waiting.state, waiting.restarts, waiting.nodes, waiting.reason) == (JobState.PENDING, 1, (), "BeginTime")
    assert (failed.exit_code, failed.exit_signal, failed.reason) == (7, None, "NonZeroExitCode")


def test_squeue_of_22_05() -> None:
    cancelled, unlimited, impossible = parse_squeue(SQUEUE_22_05)
    assert (cancelled.exit_code, cancelled.exit_signal) == (0, 15)
    assert (unlimited.end_limit, unlimited.nodes) == (None, ("n1", "n2", "n3"))
    assert (impossible.start, impossible.node_count, impossible.reason) == (None, 9, "PartitionNodeLimit")


def test_elements_of_an_array_are_told_apart_also_before_they_have_numbers() -> None:
    jobs = parse_squeue(SQUEUE_ARRAY)
    assert [(job.id, str(job.name)) for job in jobs] == [(53, "53_2"), (53, "53_3"), (54, "53_0"), (55, "53_1")]
    assert [job.element for job in parse_squeue(SQUEUE_24_11)] == [None] * 4


def test_scontrol_of_both_versions_whatever_the_job_is_called() -> None:
    running = parse_scontrol_job(SCONTROL_22_05)
    assert running is not None
    assert (running.id, running.state, running.nodes, running.restarts) == (1, JobState.RUNNING, ("n1", "n2"), 0)
    assert running.start == time.mktime((2026, 11, 23, 3, 15, 31, 0, 0, -1))
    waiting = parse_scontrol_job(SCONTROL_24_11)
    assert waiting is not None
    assert (waiting.state, waiting.restarts, waiting.reason) == (JobState.PENDING, 1, "BeginTime")
    assert (waiting.node_count, waiting.nodes, waiting.end_limit) == (2, (), 1795407954)
    element = "JobId=55 ArrayJobId=53 ArrayTaskId=3 JobName=JobState=FAILED UserId=a(1) JobState=COMPLETED"
    parsed = parse_scontrol_job(element)
    assert parsed is not None and (parsed.id, parsed.state, str(parsed.name)) == (55, JobState.COMPLETED, "53_3")


def test_sacct_tells_every_run_of_a_job_and_no_steps() -> None:
    preempted, completed, cancelled, element, last = parse_sacct(SACCT)
    assert [preempted.id, completed.id, cancelled.id] == [12, 12, 13]
    assert [run.state for run in (preempted, completed, cancelled)] == [
        JobState.PREEMPTED,
        JobState.COMPLETED,
        JobState.CANCELLED,
    ]
    assert [str(job.name) for job in (completed, element, last)] == ["12", "53_3", "53_4"]
    assert [parse_job_id(name) for name in ("12", "53_3")] == [12, element.name]
    assert (preempted.exit_signal, cancelled.start, cancelled.nodes) == (9, None, ())


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n[1-2,07],login", ("n1", "n2", "n07", "login")),
        ("gpu-a[008-011]", ("gpu-a008", "gpu-a009", "gpu-a010", "gpu-a011")),
        ("rack[0-1]n[1,3]", ("rack0n1", "rack0n3", "rack1n1", "rack1n3")),
        ("n[1-2]-ib", ("n1-ib", "n2-ib")),
        ("(null)", ()),
        ("", ()),
    ],
)
def test_lists_of_nodes(text: str, names: tuple[str, ...]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("01:00:00", 3600), ("2-00:00:00", 172800), ("30:00", 1800), ("UNLIMITED", None), ("NONE", None)],
)
def test_durations(text: str, seconds: int | None) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:8", {"": 8}),
        ("gpu:h100:4(S:0-1),nvme:1", {"h100": 4}),
        ("gpu:a100_3g.20gb:2,gpu:a100:6", {"a100_3g.20gb": 2, "a100": 6}),
        ("gpu", {"": 1}),
        ("(null)", {}),
        ("craynetwork:4", {}),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: dict[str, int]) -> None:
    assert parse_gpus(gres) == gpus


def test_groups_of_nodes_and_whether_they_run_jobs() -> None:
    groups = parse_node_groups("low|4|idle|8+|8000|gpu:8\nlow|2|down*|8|8000|(null)\nlow|1|mix-|8|8000|(null)\n")
    assert [(group.count, group.cpus, group.usable) for group in groups] == [(4, 8, True), (2, 8, False), (1, 8, True)]
    assert groups[0] == NodeGroup("low", 4, "idle", 8, 8000, {"": 8})


def test_partition_with_limits() -> None:
    line = (
        "PartitionName=gpu AllowGroups=ALL Default=NO DefaultTime=NONE GraceTime=120 MaxNodes=16 MaxTime=2-00:00:00 "
        "PriorityTier=3 PreemptMode=REQUEUE State=DRAIN TotalCPUs=32 TotalNodes=40"
    )
    partition = parse_partition(line)
    assert partition is not None
    assert (partition.max_time, partition.default_time, partition.max_nodes) == (172800, None, 16)
    assert (partition.up, partition.default, partition.grace, partition.nodes) == (False, False, 120, 40)


def test_settings_that_are_not_set_are_left_out() -> None:
    text = "Configuration data as of 2026\nJobRequeue      = 1\nPreemptMode     = (null)\nPowerPlugin   = \n"
    assert parse_config(text) == {"JobRequeue": "1"}
