"""One Slurm job of a run, or an array of them, as plain values from the resolved config: all that its script says.

Owns what a step's job asks for, starts and passes on. How that is written down belongs to `miles.cluster.slurm.render`,
in which order jobs are submitted to `miles.cluster.slurm.submit`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from miles.cluster.containers import container_command, source_tree
from miles.cluster.slurm.environment import SECRETS
from miles.config.cluster import SlurmSection
from miles.config.schema import EvalStep, RlStep, RunConfig, SftStep
from miles.errors import ConfigError
from miles.runs.paths import RunPaths
from miles.workflow.fingerprint import user_paths

NODE_MODULE = "miles.cluster.node"
"""What runs on every node of a job."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job before it is rendered."""

    run: str
    step: str
    run_dir: Path
    section: SlurmSection
    command: tuple[str, ...]
    """What srun starts on each node, with the container's words before it."""
    needs_ranks: bool
    """Whether the step has trainer ranks or engines; a job without them gets one node and no GPU."""
    environment: dict[str, str]
    """Variables that the script sets."""
    output: Path
    """Output of the job; `%j` stands for its id."""
    nodes: str
    """Number of nodes, or a range of it."""
    dependency: str | None
    """Jobs to wait for, in sbatch's words."""


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """The jobs of one step of several runs, as one job array."""

    job: JobSpec
    """What every element asks for, under the array's own name, output and dependency."""
    members: dict[int, Path]
    """Run directories by the index of their element. Each holds the script that the element runs."""
    at_once: int | None
    """Elements that may run at the same time; None: all."""


def array_spec(
    name: str, directory: Path, jobs: Mapping[int, JobSpec], *, at_once: int | None, dependency: str | None
) -> ArraySpec:
    """The array of one step's jobs, called after the sweep, with its output in a directory of the sweep's.

    Raises ConfigError where the jobs do not all ask for the same.
    """
    first, *others = jobs.values()
    for other in others:
        _refuse_difference(first, other)
    job = replace(first, run=name, output=directory / first.output.name, dependency=dependency)
    return ArraySpec(job, {index: job.run_dir for index, job in jobs.items()}, at_once)


def _refuse_difference(one: JobSpec, other: JobSpec) -> None:
    keys = [key for key in SlurmSection.model_fields if getattr(one.section, key) != getattr(other.section, key)]
    names = [f"slurm.{key}" for key in keys] + ["kind"] * (one.needs_ranks is not other.needs_ranks)
    if names:
        raise ConfigError(
            f"step '{one.step}': {names[0]} differs between the runs '{one.run}' and '{other.run}'; the elements of a "
            "job array all ask for the same",
            fix="submit these runs one by one",
        )


def job_spec(config: RunConfig, step: str, paths: RunPaths, *, dependency: str | None) -> JobSpec:
    """The job of one step.

    Raises ConfigError for a container that cannot be started.
    """
    resolved = config.steps[step]
    section = resolved.slurm
    needs_ranks = isinstance(resolved, SftStep | RlStep | EvalStep)
    contained = resolved.container.runtime != "none"
    prefix = container_command(
        resolved.container,
        run_dir=paths.root,
        paths=user_paths(resolved),
        gpus=needs_ranks and section.gpus_per_node > 0,
        environment=SECRETS,
    )
    python = section.python or ("python3" if contained else sys.executable)
    return JobSpec(
        run=config.name,
        step=step,
        run_dir=paths.root,
        section=section,
        command=(*prefix, python, "-m", NODE_MODULE, "--run-dir", str(paths.root), "--step", step),
        needs_ranks=needs_ranks,
        environment={} if contained else _python_path(),
        output=paths.slurm_log(step, "%j"),
        nodes=str(section.nodes) if needs_ranks else "1",
        dependency=dependency,
    )


def _python_path() -> dict[str, str]:
    """Where Python finds what it finds now: a checkout of Miles, and the user's own graders."""
    places = [str(source_tree() or ""), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = dict.fromkeys(str(Path(place).absolute()) for place in places if place)
    return {"PYTHONPATH": os.pathsep.join(found)} if found else {}
