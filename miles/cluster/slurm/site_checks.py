"""Checks of `miles doctor` on Slurm: what the site allows, and what becomes of a run there.

`read_site` asks, `site_checks` judges: pure, and tried with sites that no test can build.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from miles.cluster.checks import Check, Status
from miles.cluster.slurm.commands import Slurm, SlurmDown, SlurmError, SlurmMissing
from miles.cluster.slurm.site import NodeGroup, Partition
from miles.errors import Interrupted

OLDEST = (22, 5)
"""The oldest version that the tests ran on."""
ASSUMES_PREEMPTED = (24, 5)
"""From here on, a job that ends by itself in its grace is put back into the queue all the same."""


@dataclass(frozen=True, slots=True)
class Site:
    """What Slurm says about a cluster."""

    version: tuple[int, int]
    config: dict[str, str]
    partitions: list[Partition]
    nodes: list[NodeGroup]
    accounting: str = ""
    """Why the accounting does not answer, where there is one; empty: it does, or there is none."""

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.config.get("ClusterName", "cluster")

    @property
    def preempts(self) -> bool:
        """Whether anything preempts here."""
        return self.config.get("PreemptType", "preempt/none") not in ("preempt/none", "(null)")

    @property
    def user_signal(self) -> bool:
        """Whether a preemption begins with the signal of `--signal`."""
        parameters = f"{self.config.get('SlurmctldParameters', '')},{self.config.get('PreemptParameters', '')}"
        return bool({"preempt_send_user_signal", "send_user_signal"} & set(parameters.split(",")))

    def preempt_mode(self, partition: Partition) -> str:
        """`REQUEUE`, `CANCEL`, `SUSPEND` or `OFF`, as it applies to the partition's jobs."""
        if not self.preempts:
            return "OFF"
        mode = partition.preempt_mode
        return (self.config.get("PreemptMode", "OFF") if mode in ("", "CLUSTER") else mode).upper()

    def gpus(self, partition: str) -> dict[str, int]:
        """GPUs of a node of the partition by type, the most that one has."""
        most: dict[str, int] = {}
        for group in self.nodes:
            if group.partition == partition:
                for kind, count in group.gpus.items():
                    most[kind] = max(most.get(kind, 0), count)
        return most


def read_site(slurm: Slurm) -> Site:
    """Ask Slurm. Raises SlurmError."""
    version, config = slurm.version(), slurm.config()
    accounting = ""
    if _has_accounting(config):
        try:
            slurm.accounted([1], strict=True)
        except SlurmError as error:
            accounting = error.message
    return Site(version, config, slurm.partitions(), slurm.node_groups(), accounting)


def slurm_checks(slurm: Slurm, environment: Mapping[str, str]) -> Iterator[Check]:
    """All checks on Slurm; one that is skipped where there is none."""
    try:
        site = read_site(slurm)
    except SlurmMissing:
        message = "no Slurm on this machine: `miles submit FILE --local` runs here without it"
        yield Check("slurm", Status.SKIP, message)
        return
    except SlurmDown as error:
        yield Check("slurm", Status.FAIL, error.message, "the controller of the cluster is down: try again later")
        return
    except SlurmError as error:
        yield Check("slurm", Status.FAIL, error.message, error.fix or "")
        return
    yield from site_checks(site)
    yield own_variables(environment)


def site_checks(site: Site) -> Iterator[Check]:
    """What a run meets on this site."""
    yield _version(site)
    yield from _partitions(site)
    yield _gpus(site)
    yield _requeue(site)
    yield _requeue_exit(site)
    yield from _preemption(site)
    yield _user_signal(site)
    yield _accounting(site)


def _version(site: Site) -> Check:
    told = f"Slurm {site.version[0]}.{site.version[1]:02}, cluster {site.name}"
    if site.version < OLDEST:
        message = f"{told}; nothing older than {OLDEST[0]}.{OLDEST[1]:02} was tried"
        return Check("slurm", Status.WARN, message, "rehearse with `miles preempt` before a long run")
    if site.version < ASSUMES_PREEMPTED:
        message = f"{told}: it does not requeue a job that ends within its grace; Miles' jobs requeue themselves"
        return Check("slurm", Status.OK, message)
    return Check("slurm", Status.OK, f"{told}: it requeues a job that ends within its grace")


def _partitions(site: Site) -> Iterator[Check]:
    if not site.partitions:
        yield Check("partitions", Status.FAIL, "you see no partition", "ask the operators for one")
        return
    for partition in site.partitions:
        told = f"{partition.name}: {describe(site, partition)}"
        working = sum(group.count for group in site.nodes if group.partition == partition.name and group.usable)
        if not partition.up:
            yield Check("partition", Status.WARN, f"{told}; not up: jobs wait in it", "another slurm.partition")
        elif not working:
            yield Check("partition", Status.WARN, f"{told}; none of its nodes works now", "another slurm.partition")
        else:
            yield Check("partition", Status.OK, told)
    if not any(partition.default for partition in site.partitions):
        message = "no partition is the default: jobs must name one"
        yield Check("partitions", Status.WARN, message, "set slurm.partition")


def describe(site: Site, partition: Partition) -> str:
    """`default, 4 nodes with 8 GPUs (h100), limit 2-00:00:00`."""
    gpus = site.gpus(partition.name)
    with_gpus = " with " + " or ".join(f"{count} GPUs{f' ({kind})' * bool(kind)}" for kind, count in gpus.items())
    limits = f"limit {clock_time(partition.max_time)}" if partition.max_time is not None else "no time limit"
    if partition.default_time is not None and partition.default_time != partition.max_time:
        limits += f" ({clock_time(partition.default_time)} unless asked)"
    if partition.max_nodes is not None:
        limits += f", at most {partition.max_nodes} nodes a job"
    return f"{'default, ' * partition.default}{partition.nodes} nodes{with_gpus * bool(gpus)}, {limits}"


def clock_time(seconds: int) -> str:
    """Seconds as Slurm writes them, `D-HH:MM:SS`."""
    days, rest = divmod(seconds, 86400)
    return f"{f'{days}-' * bool(days)}{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def _gpus(site: Site) -> Check:
    kinds = sorted({kind for group in site.nodes for kind in group.gpus})
    if not kinds:
        return Check("gpus", Status.WARN, "Slurm knows no GPUs here", "slurm.gpus_per_node = 0 runs on CPUs")
    named = [kind for kind in kinds if kind]
    if not named:
        return Check("gpus", Status.OK, "GPUs have no type here: leave slurm.gpu_type out")
    return Check("gpus", Status.OK, f"types for slurm.gpu_type: {', '.join(named)}")


def _requeue(site: Site) -> Check:
    found = re.search(r"cred_expire=(\d+)", site.config.get("AuthInfo", ""))
    delay = int(found[1]) + 1 if found else 121
    told = f"a job that is put back into the queue waits {delay} s before it may start"
    if site.config.get("JobRequeue") == "0":
        message = f"only jobs that ask for it are put back into the queue (JobRequeue=0); Miles' jobs ask; {told}"
        return Check("requeue", Status.OK, message)
    return Check("requeue", Status.OK, told)


def _requeue_exit(site: Site) -> Check:
    """Codes with which the site requeues or holds whatever job ends; ours for "not done" must not be one of them."""
    code = Interrupted.exit_code
    for setting, what in (("RequeueExit", "put back into the queue"), ("RequeueExitHold", "held in the queue")):
        if code in _codes(site.config.get(setting, "")):
            message = f"{setting} has {code}: a run that you stop is {what}"
            return Check("exit-codes", Status.WARN, message, "`miles stop --now` cancels its jobs instead")
    return Check("exit-codes", Status.OK, f"the site gives exit code {code}, not done, no meaning of its own")


def _codes(text: str) -> set[int]:
    codes: set[int] = set()
    for part in re.findall(r"\d+(?:-\d+)?", text):
        first, _, last = part.partition("-")
        codes.update(range(int(first), int(last or first) + 1))
    return codes


def _preemption(site: Site) -> Iterator[Check]:
    if not site.preempts:
        yield Check("preemption", Status.OK, "no job is preempted here")
        return
    if site.config.get("PreemptType") == "preempt/qos":
        message = "by quality of service: `sacctmgr show qos format=name,preempt,preemptmode,gracetime` tells the modes"
        yield Check("preemption", Status.OK, message)
    kill_wait = site.config.get("KillWait", "30 sec").split()[0]
    for partition in site.partitions:
        mode, told = site.preempt_mode(partition), f"jobs of {partition.name}"
        if mode.startswith("OFF"):
            yield Check("preemption", Status.OK, f"{told} are not preempted")
        elif "REQUEUE" in mode:
            grace = f"{partition.grace} s after a signal" if partition.grace else "at once, without grace"
            message = f"{told} are requeued {grace} (killed {kill_wait} s later)"
            yield Check("preemption", Status.OK, message)
        elif "CANCEL" in mode:
            message = f"{told} are cancelled when they are preempted, {partition.grace} s after a signal"
            yield Check("preemption", Status.WARN, message, 'slurm.restart = "chain": successors take over')
        else:
            message = f"{told} are suspended when they are preempted: their processes stop and keep their memory"
            yield Check("preemption", Status.WARN, message, "prefer another partition; engines may time out meanwhile")


def _user_signal(site: Site) -> Check:
    if not site.preempts:
        return Check("user-signal", Status.SKIP, "no job is preempted here")
    if site.user_signal:
        return Check("user-signal", Status.OK, "a preemption begins with the signal of --signal, to the batch script")
    return Check("user-signal", Status.OK, "a preemption begins with SIGTERM to the processes; --signal plays no part")


def _accounting(site: Site) -> Check:
    age = site.config.get("MinJobAge", "300 sec").split()[0]
    if not _has_accounting(site.config):
        message = f"none: Slurm forgets a job {age} s after its end, and the run's own ledger tells its history"
        return Check("accounting", Status.OK, message)
    if site.accounting:
        message = f"sacct does not answer: {site.accounting}"
        return Check("accounting", Status.WARN, message, "nothing of Miles needs it; the operators may want to know")
    return Check("accounting", Status.OK, "sacct answers")


def _has_accounting(config: Mapping[str, str]) -> bool:
    return config.get("AccountingStorageType", "").removeprefix("accounting_storage/") not in ("", "none", "(null)")


def own_variables(environment: Mapping[str, str]) -> Check:
    """Variables with which this user changes sbatch's defaults."""
    names = sorted(name for name in environment if name.startswith("SBATCH_"))
    if not names:
        return Check("environment", Status.OK, "no SBATCH_ variable changes what jobs ask for")
    message = f"{', '.join(names)} set: `miles submit` ignores them, the run file decides alone"
    return Check("environment", Status.WARN, message, "put what they say into [slurm] of the run file")
