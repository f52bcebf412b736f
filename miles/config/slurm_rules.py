"""What cannot work in a step's `[slurm]`: each finding with its bound and fix. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.config.cluster import SlurmSection
from miles.config.problems import Finding, shown
from miles.config.slurm_options import extra_problems, has_control_characters

MAX_LEAD_SECONDS = 65535
"""sbatch keeps the time of --signal in 16 bits."""
_TEXTS = ("partition", "account", "qos", "reservation", "constraint")
_GPU_TYPE = re.compile(r"[A-Za-z0-9_.-]+")


def slurm_findings(slurm: SlurmSection) -> Iterator[Finding]:
    """Everything that sbatch would refuse or misread, or that would end each job as soon as it begins."""
    low, high = node_bounds(slurm)
    if low > high:
        message = f"slurm.nodes = {shown(slurm.nodes)}: the range is empty"
        yield _finding("nodes", message, f'write "{high}-{low}"')
    for name in _TEXTS:
        value = getattr(slurm, name)
        if value is not None and (not value.strip() or has_control_characters(value)):
            what = "holds a line break or control character" if value.strip() else "is empty"
            yield _finding(name, f"slurm.{name} = {shown(value)}: {what}", f"write it on one line, or leave {name} out")
    yield from _gpus(slurm)
    yield from _lead(slurm)
    if slurm.restart == "chain" and slurm.chain_length < 2:
        message = 'slurm.restart = "chain" with slurm.chain_length = 1: there is no job to take over'
        yield _finding("chain_length", message, "set slurm.chain_length to 2 or more")
    for number, line in enumerate(slurm.setup):
        if has_control_characters(re.sub(r"[\n\t]", "", line)):
            message = f"slurm.setup[{number}] = {shown(line)}: holds a control character"
            yield _finding("setup", message, "write plain shell lines")
    for name, message, fix in extra_problems(slurm.extra):
        yield Finding((("slurm", "extra", name),), message, fix)


def node_bounds(slurm: SlurmSection) -> tuple[int, int]:
    """The smallest and the largest number of nodes of a job."""
    low, _, high = str(slurm.nodes).partition("-")
    return int(low), int(high or low)


def time_limit_seconds(text: str) -> int:
    """Seconds of a time limit in Slurm's words (`TIME_LIMIT`)."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (60, 1) if not dash and len(parts) < 3 else (3600, 60, 1)
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _gpus(slurm: SlurmSection) -> Iterator[Finding]:
    if slurm.gpu_type is None:
        return
    given = f"slurm.gpu_type = {shown(slurm.gpu_type)}"
    if not _GPU_TYPE.fullmatch(slurm.gpu_type):
        fix = "write the type alone, for example h100; `miles doctor` lists those of the cluster"
        yield _finding("gpu_type", f"{given}: a type has letters, digits, '_', '.' and '-' only", fix)
    elif not slurm.gpus_per_node:
        yield _finding("gpu_type", f"{given} without slurm.gpus_per_node: no GPU is asked for", "set both, or neither")


def _lead(slurm: SlurmSection) -> Iterator[Finding]:
    lead = slurm.save_lead_minutes * 60
    given = f"slurm.save_lead_minutes = {slurm.save_lead_minutes:g}"
    if lead > MAX_LEAD_SECONDS:
        most = MAX_LEAD_SECONDS // 60
        message = f"{given}: sbatch signals at most {most} minutes before the end"
        yield _finding("save_lead_minutes", message, f"set it to at most {most}")
    limit = time_limit_seconds(slurm.time) if slurm.time is not None else None
    if limit and lead >= limit:
        message = f"{given} with slurm.time = {shown(slurm.time)}: each job would save and end as soon as it begins"
        yield _finding("save_lead_minutes time", message, "give the job more time, or a shorter lead")


def _finding(keys: str, message: str, fix: str) -> Finding:
    return Finding(tuple(("slurm", key) for key in keys.split()), message, fix)
