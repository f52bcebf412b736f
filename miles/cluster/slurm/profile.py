"""The site profile that `miles init --site` writes: a fragment of a run file with what was found, to be extended.

Owns its text. What was found comes from `miles.cluster.slurm.site_checks`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from miles.cluster.slurm.site import Partition
from miles.cluster.slurm.site_checks import Site, clock_time, describe
from miles.config.problems import shown

WIDTH = 100


def site_profile(site: Site, runtimes: Mapping[str, str], file: str) -> str:
    """The text of the profile. `runtimes`: versions of the container runtimes by name; `file`: where it will lie."""
    chosen = next((partition for partition in site.partitions if partition.default), None)
    head = [
        f"Site profile of cluster {site.name} (Slurm {site.version[0]}.{site.version[1]:02}), by `miles init --site`.",
        f"A run file beside its directory takes it by `extends = {shown(file)}`; what the run file itself says wins. "
        "Edit it as you like; `miles doctor` shows what it was made from.",
    ]
    partitions = [f"{one.name}: {describe(site, one)}; {_ending(site, one)}" for one in site.partitions]
    lines = [*map(_comment, head), "", "[slurm]", _comment("The partitions here:"), *map(_comment, partitions)]
    lines.append(f"partition = {shown(chosen.name)}" if chosen else '# partition = "..."')
    lines += [_comment("What is charged, where the site wants to know."), '# account = "..."', '# qos = "..."']
    lines += _time(chosen)
    lines += _gpus(site, chosen)
    lines += _restart(site, chosen)
    lines += [_comment("Shell lines before everything else in each job."), '# setup = ["module load cuda"]']
    lines += _container(runtimes)
    return "\n".join(lines) + "\n"


def _time(chosen: Partition | None) -> list[str]:
    comment = _comment("Limit of one job; a run longer than that goes on in the next job by itself.")
    if chosen is None or chosen.max_time is None:
        return [comment, '# time = "1-00:00:00"']
    return [comment, f"time = {shown(clock_time(chosen.max_time))}"]


def _gpus(site: Site, chosen: Partition | None) -> list[str]:
    kinds = site.gpus(chosen.name) if chosen else {}
    comment = _comment("GPUs of each node that a job asks for.")
    if not kinds:
        return [comment, "# gpus_per_node = 0"]
    if len(kinds) > 1:
        types = ", ".join(f"{shown(kind)} ({count})" for kind, count in sorted(kinds.items()) if kind)
        return [
            comment,
            _comment(f"This partition has several types: {types}."),
            "# gpus_per_node = 0",
            '# gpu_type = "..."',
        ]
    ((kind, count),) = kinds.items()
    return [comment, f"gpus_per_node = {count}", *([f"gpu_type = {shown(kind)}"] if kind else [])]


def _restart(site: Site, chosen: Partition | None) -> list[str]:
    mode = site.preempt_mode(chosen) if chosen else "OFF"
    if "CANCEL" in mode:
        return [_comment("Preemption cancels jobs here: successors that wait take over."), 'restart = "chain"']
    lines = [_comment("How a run goes on after its job ended early."), 'restart = "requeue"']
    if chosen and "REQUEUE" in mode:
        lines += [_comment("Between the signal of a preemption and the kill; not set: as the partition says.")]
        lines += [f"# grace_seconds = {chosen.grace}"]
    return lines


def _container(runtimes: Mapping[str, str]) -> list[str]:
    if not runtimes:
        return []
    told = ", ".join(f"{runtime} ({version})" for runtime, version in runtimes.items())
    return [
        "",
        _comment(f"Container runtimes on the machine that wrote this: {told}."),
        "# [container]",
        f"# runtime = {shown(next(iter(runtimes)))}",
        '# image = "..."',
    ]


def _ending(site: Site, partition: Partition) -> str:
    mode = site.preempt_mode(partition)
    if mode.startswith("OFF"):
        return "not preempted"
    what = "requeued" if "REQUEUE" in mode else "cancelled" if "CANCEL" in mode else "suspended"
    return f"{what} when preempted, {partition.grace} s after a signal"


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH))
