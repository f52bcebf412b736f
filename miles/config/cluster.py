"""The sections of the run file about the cluster: what a step's job asks Slurm for, and the container it runs in.

No result depends on any of these keys: all may change between two attempts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from miles.config.base import MayChange, NonNegativeInt, Section

TIME_LIMIT = r"^(\d+|\d+:\d{1,2}|\d+:\d{1,2}:\d{1,2}|\d+-\d{1,2}(:\d{1,2}){0,2})$"
"""Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]."""
NODE_RANGE = r"^[1-9]\d*-[1-9]\d*$"
MEMORY = r"^[1-9]\d*[KMGT]?$"

FORMS = {
    TIME_LIMIT: ("minutes, [HH:]MM:SS or D-HH[:MM[:SS]], in quotes", "4:00:00"),
    NODE_RANGE: ('a range "LOW-HIGH"', "2-4"),
    MEMORY: ("megabytes, or a number with K, M, G or T, in quotes", "200G"),
}
"""How error messages describe each pattern, and an example."""

TimeLimit = Annotated[str, Field(pattern=TIME_LIMIT)]
NodeRange = Annotated[str, Field(pattern=NODE_RANGE)]
Memory = Annotated[str, Field(pattern=MEMORY)]


class SlurmSection(Section):
    """What the job of a step asks Slurm for. Steps without ranks (tiny-task, report) get one node and no GPU."""

    partition: MayChange[str | None] = None
    """Partition, or several with commas; not set: the cluster's default."""
    account: MayChange[str | None] = None
    """Account that is charged."""
    qos: MayChange[str | None] = None
    """Quality of service."""
    reservation: MayChange[str | None] = None
    """Reservation to run in."""
    constraint: MayChange[str | None] = None
    """Node features, as `--constraint` takes them."""
    time: MayChange[TimeLimit | None] = None
    """Time limit of one job, as `D-HH:MM:SS`, `HH:MM:SS` or minutes; not set: the partition's default. A run longer
    than that goes on in the next job by itself."""
    nodes: MayChange[PositiveInt | NodeRange] = 1
    """Nodes of the job. A range, `"2-4"`, starts with what there is; each attempt may have another number."""
    gpus_per_node: MayChange[NonNegativeInt] = 0
    """GPUs of each node; the trainer's ranks and the engines of a node share them."""
    gpu_type: MayChange[str | None] = None
    """Type of GPU as the cluster calls it, for example `h100`."""
    cpus_per_node: MayChange[PositiveInt | None] = None
    """CPUs of each node; not set: what Slurm gives a task."""
    memory_per_node: MayChange[Memory | None] = None
    """Memory of each node, for example `"200G"`; not set: the partition's default."""
    exclusive: MayChange[bool] = False
    """Share the nodes with no other job."""
    restart: MayChange[Literal["requeue", "chain", "none"]] = "requeue"
    """How a run that is not done goes on after its job ends early: the job is put back into the queue; or successors,
    submitted beforehand, take over, where the site forbids requeueing; or not by itself."""
    chain_length: MayChange[PositiveInt] = 8
    """Jobs that are submitted for a step with `restart = "chain"`; those that find nothing to do end at once."""
    max_attempts: MayChange[PositiveInt] = 100
    """Attempts of one step that are started without a person."""
    max_idle_attempts: MayChange[PositiveInt] = 2
    """Attempts in a row without one new training step, or token, on disk; then the run stops and says why. Those that
    the cluster ended (preempted, requeued, node lost) do not count."""
    save_lead_minutes: MayChange[PositiveFloat] = 5.0
    """How long before its time limit a job begins to save and end."""
    grace_seconds: MayChange[NonNegativeFloat | None] = None
    """Time between the signal of a preemption and the kill; not set: as the partition says."""
    setup: MayChange[list[str]] = []
    """Shell lines that each job runs first, for example `module load cuda`."""
    python: MayChange[str | None] = None
    """Python of the jobs; not set: the one that submits, or `python3` in a container."""
    template: MayChange[str | None] = None
    """Your own template of the batch script in place of Miles' (docs/slurm.md). Relative to the run file."""
    extra: MayChange[dict[str, str | int | bool]] = {}
    """Any other options of sbatch by their long names: `{comment = "RL", mail-type = "END"}`; true: without value."""


class ContainerSection(Section):
    """The container that the processes of a step run in. `miles container check` tries it."""

    runtime: MayChange[Literal["none", "apptainer", "singularity", "enroot", "charliecloud"]] = "none"
    """Program that runs it."""
    image: MayChange[str | None] = None
    """Image file or directory, as the runtime takes it. Relative to the run file."""
    binds: MayChange[list[str]] = []
    """Further directories to bind, `HOST[:CONTAINER[:ro]]`; run directory, model and data come by themselves."""
    gpu: MayChange[Literal["auto", "nvidia", "rocm", "none"]] = "auto"
    """Driver libraries to bring in; auto: those of the GPUs that the job asks for (NVIDIA's)."""
    env: MayChange[list[str]] = []
    """Names of further environment variables that reach the container; what Miles, Slurm and CUDA need does."""
    home: MayChange[bool] = False
    """Bind the home directory."""
    extra_args: MayChange[list[str]] = []
    """Further arguments of the runtime, before the image."""
