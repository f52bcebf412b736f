"""The configuration of the cluster that testbed.py runs."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .testbed import Testbed

CPUS, GPUS, MEMORY_MB = 8, 8, 8000


def host_address() -> str:
    """What the host's name means: the only address on which the daemons listen (`NoInAddrAny`), usually loopback."""
    return socket.gethostbyname(socket.gethostname())


def slurm_conf(bed: Testbed, host: str, accounting: Mapping[str, object]) -> str:
    """`slurm.conf`: every daemon on one address with a port of its own, and timings for tests.

    `accounting`: settings about it; empty where there is none.
    """
    address = host_address()
    base, user = bed.directory, pwd.getpwuid(os.getuid()).pw_name
    controller_parameters = ["idle_on_node_suspend"] + ["preempt_send_user_signal"] * bed.send_user_signal
    scheduler = {"batch_sched_delay": 0, "sched_interval": 2, "sched_min_interval": 100000}
    scheduler |= {"bf_interval": 2, "bf_yield_interval": 1000000}
    settings: Mapping[str, object] = {
        "ClusterName": "testbed",
        "SlurmctldHost": f"{host}({address})",
        "SlurmUser": user,
        "SlurmdUser": user,
        "SlurmctldPort": bed.port,
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        "AuthInfo": f"socket={base}/run/munge.sock,cred_expire=5",  # a requeued job waits for one second more than that
        **(accounting or {"AccountingStorageType": "accounting_storage/none"}),
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "MpiDefault": "none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "JobAcctGatherType": "jobacct_gather/linux",
        "StateSaveLocation": base / "state",
        "SlurmctldPidFile": base / "run/slurmctld.pid",
        "SlurmctldLogFile": base / "log/slurmctld.log",
        "SlurmdSpoolDir": base / "spool/%n",
        "SlurmdPidFile": base / "run/slurmd.%n.pid",
        "SlurmdLogFile": base / "log/slurmd.%n.log",
        "SlurmdParameters": "config_overrides",
        "SlurmctldTimeout": 10,
        "SlurmdTimeout": bed.slurmd_timeout,
        "MessageTimeout": 10,
        "InactiveLimit": 0,
        "KillWait": bed.kill_wait,
        "MinJobAge": 3600,
        "ReturnToService": 2,
        "JobRequeue": int(bed.requeue),
        "BatchStartTimeout": 10,
        "RebootProgram": "/bin/true",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        "DefMemPerCPU": 100,
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": ",".join(f"{key}={value}" for key, value in scheduler.items()),
        "PriorityType": "priority/basic",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": ",".join(controller_parameters),
        "GresTypes": "gpu",
    }
    shape = f"CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{GPUS} Feature=fake State=UNKNOWN"
    usual = "Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP"
    return "\n".join(
        [f"{key}={value}" for key, value in settings.items()]
        + bed.extra
        + [
            f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={bed.port + number} {shape}"
            for number, name in enumerate(bed.names, start=1)
        ]
        + [
            f"PartitionName=low {usual} PriorityTier=1 PreemptMode=REQUEUE GraceTime={bed.grace} Default=YES",
            f"PartitionName=kill {usual} PriorityTier=1 PreemptMode=CANCEL GraceTime={bed.grace}",
            f"PartitionName=high {usual} PriorityTier=10 PreemptMode=OFF",
            "",
        ]
    )
