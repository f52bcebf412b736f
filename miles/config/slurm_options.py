"""`[slurm.extra]`: which options of sbatch there are, which take a value, and which Miles sets itself.

Facts from sbatch's manual, 22.05 to 26.05. Owns what may be written there, not how it is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from miles.errors import did_you_mean

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

OWN = {
    "account": "write slurm.account",
    "array": "use `miles submit --sweep`",
    "clusters": "log in to that cluster and submit there",
    "constraint": "write slurm.constraint",
    "cpus-per-gpu": "write slurm.cpus_per_node",
    "cpus-per-task": "write slurm.cpus_per_node",
    "dependency": "write needs of the step, which orders the jobs of a run",
    "error": "the output of all processes is in the run directory (`miles logs`)",
    "exclusive": "write slurm.exclusive",
    "export": "write `export NAME=value` in slurm.setup, or container.env for what reaches a container",
    "export-file": "write `export NAME=value` in slurm.setup",
    "gpus": "write slurm.gpus_per_node",
    "gpus-per-node": "write slurm.gpus_per_node and slurm.gpu_type",
    "gpus-per-socket": "write slurm.gpus_per_node",
    "gpus-per-task": "write slurm.gpus_per_node",
    "gres": "write slurm.gpus_per_node and slurm.gpu_type",
    "help": "run `sbatch --help`",
    "ignore-pbs": "Miles writes no line for PBS",
    "input": "a job of Miles reads no input",
    "job-name": "write name, at the top of the run file",
    "kill-on-invalid-dep": "Miles sets it with its dependencies",
    "mem": "write slurm.memory_per_node",
    "mem-per-cpu": "write slurm.memory_per_node",
    "mem-per-gpu": "write slurm.memory_per_node",
    "no-requeue": "write slurm.restart",
    "nodes": "write slurm.nodes",
    "ntasks": "write slurm.nodes and local.ranks: srun starts one supervisor on each node, which starts the ranks",
    "ntasks-per-core": "write local.ranks",
    "ntasks-per-gpu": "write local.ranks",
    "ntasks-per-node": "write local.ranks",
    "ntasks-per-socket": "write local.ranks",
    "open-mode": "the output has to outlive a requeue",
    "output": "the output is in the run directory (`miles logs`)",
    "parsable": "Miles reads the job's number itself",
    "partition": "write slurm.partition",
    "qos": "write slurm.qos",
    "quiet": "Miles reads what sbatch says",
    "requeue": "write slurm.restart",
    "reservation": "write slurm.reservation",
    "signal": "write slurm.save_lead_minutes",
    "test-only": "use `miles submit --dry-run`",
    "time": "write slurm.time",
    "tres-per-task": "write slurm.gpus_per_node and slurm.cpus_per_node",
    "usage": "run `sbatch --usage`",
    "verbose": "Miles reads what sbatch says",
    "version": "run `sbatch --version`",
    "wait": "use `miles watch`",
    "wrap": "Miles writes the script; slurm.setup and slurm.template change it",
}
"""What Miles sets or reads itself, and what to do instead."""

_FLAGS = frozenset(("contiguous", "hold", "overcommit", "oversubscribe", "reboot", "spread-job", "use-min-nodes"))
_FLAGS_OR_VALUES = frozenset(("get-user-env", "nice", "no-kill", "propagate", "resv-ports", "stepmgr"))
_VALUES = frozenset(
    (
        *(
            "acctg-freq",
            "batch",
            "bb",
            "bbf",
            "begin",
            "chdir",
            "cluster-constraint",
            "comment",
            "consolidate-segments",
        ),
        *("container", "container-id", "core-spec", "cores-per-socket", "cpu-freq", "deadline", "delay-boot"),
        *("distribution", "exclude", "extra", "extra-node-info", "gid", "gpu-bind", "gpu-freq", "gres-flags", "hint"),
        *("licenses", "mail-type", "mail-user", "mcs-label", "mem-bind", "mincpus", "network", "nodefile", "nodelist"),
        *("oom-kill-step", "power", "prefer", "priority", "profile", "segment", "sockets-per-node", "spread-segments"),
        *("switches", "thread-spec", "threads-per-core", "time-min", "tmp", "uid", "wait-all-nodes", "wckey"),
    )
)
KNOWN = frozenset(OWN) | _FLAGS | _FLAGS_OR_VALUES | _VALUES


def has_control_characters(text: str) -> bool:
    """Whether a text holds what no option of sbatch can: it would end its line."""
    return _CONTROL.search(text) is not None


def extra_problems(extra: Mapping[str, str | int | bool]) -> Iterator[tuple[str, str, str]]:
    """Name, message and fix of each option of `[slurm.extra]` that cannot be passed on."""
    for name, value in extra.items():
        given = f"slurm.extra.{name}"
        if name in OWN:
            yield name, f"{given}: Miles sees to --{name} itself", OWN[name]
        elif name not in KNOWN:
            fix = "write the long name of an option without its dashes (`sbatch --help`), for example mail-type"
            yield name, f"{given}: sbatch has no such option.{did_you_mean(name, KNOWN - set(OWN))}", fix
        elif value is False:
            yield name, f"{given} = false: options are not switched off", "leave it out"
        elif value is True and name in _VALUES:
            # sbatch would take the option on the next line for its value.
            yield name, f"{given} = true: --{name} takes a value", f'write {name} = "..."'
        elif value is not True and name in _FLAGS:
            yield name, f"{given} = {value!r}: --{name} takes no value", f"write {name} = true"
        elif isinstance(value, str) and has_control_characters(value):
            yield name, f"{given} = {value!r}: holds a line break or control character", "write it on one line"
