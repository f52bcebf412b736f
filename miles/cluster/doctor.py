"""`miles doctor`: what this machine and its cluster are like, and what a run would trip over.

Owns the order of the checks and those of the machine itself. Those of Slurm are in
`miles.cluster.slurm.site_checks`, those of a directory in `miles.cluster.disk_checks`. Reads only, but for one
directory that it makes and removes again; asks nothing outside the cluster.
"""

from __future__ import annotations

import ctypes.util
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from miles.cluster.checks import Check, Status
from miles.cluster.containers import PROGRAMS, version_command
from miles.cluster.disk_checks import disk_checks
from miles.cluster.slurm.commands import Slurm
from miles.cluster.slurm.site_checks import slurm_checks

OPEN_FILES = 4096
_COMMAND_SECONDS = 30.0


def examine(directory: Path, slurm: Slurm | None = None) -> Iterator[Check]:
    """Every check, in order, as it is done. `directory`: where runs are to lie; it or a parent exists."""
    yield from slurm_checks(slurm or Slurm(timeout=20, patience=0), os.environ)
    yield from disk_checks(directory)
    yield containers()
    yield gpu_driver()
    yield nccl()
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield offline(os.environ)


def found_runtimes() -> dict[str, str]:
    """Container runtimes on this machine, by their names in the run file: what each says about its version."""
    found = {}
    for runtime, program in PROGRAMS.items():
        if shutil.which(program):
            said = _said(version_command(runtime))
            found[runtime] = said.splitlines()[0] if said else "version unknown"
    return found


def containers() -> Check:
    """Which container runtimes there are."""
    found = found_runtimes()
    if not found:
        message = "no container runtime in PATH; runs need none, and compute nodes may have one"
        return Check("containers", Status.SKIP, message)
    told = ", ".join(f"{runtime} ({version})" for runtime, version in found.items())
    return Check("containers", Status.OK, f"{told}; `miles container check` tries an image")


def gpu_driver() -> Check:
    """What nvidia-smi says."""
    if not shutil.which("nvidia-smi"):
        message = "no nvidia-smi on this machine, as on most login nodes; inside a job this check says more"
        return Check("gpu-driver", Status.SKIP, message)
    remedy = "report this node to its operators"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = _run(query)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("gpu-driver", Status.FAIL, f"nvidia-smi does not answer: {error}", remedy)
    kinds = list(dict.fromkeys(line.strip() for line in done.stdout.splitlines() if line.strip()))
    if done.returncode or not kinds:
        said = (done.stdout + done.stderr).strip()
        return Check("gpu-driver", Status.FAIL, f"nvidia-smi finds no GPU: {said}", remedy)
    count = len(done.stdout.splitlines())
    return Check("gpu-driver", Status.OK, f"{count} GPUs (name, driver, memory): {'; '.join(kinds)}")


def nccl() -> Check:
    """Which NCCL the trainer's ranks would load."""
    bundled = [
        f"{distribution.name} {distribution.version}"
        for distribution in metadata.distributions()
        if (distribution.name or "").startswith("nvidia-nccl")
    ]
    if bundled:
        return Check("nccl", Status.OK, f"{', '.join(sorted(set(bundled)))}, which torch brings")
    library = ctypes.util.find_library("nccl")
    if library:
        return Check("nccl", Status.OK, f"{library}, of the system")
    message = "no NCCL in this Python or the system: its torch computes on CPUs (a container has its own)"
    return Check("nccl", Status.SKIP, message)


def open_files(limit: int) -> Check:
    """Whether a process may open enough files: engines hold a connection for every request."""
    if limit == resource.RLIM_INFINITY or limit >= OPEN_FILES:
        return Check("open-files", Status.OK, f"a process may open {'any number of' if limit < 0 else limit} files")
    message = f"a process may open {limit} files; many requests at once need {OPEN_FILES}"
    return Check("open-files", Status.WARN, message, f'slurm.setup = ["ulimit -n {OPEN_FILES}"]')


def offline(environment: Mapping[str, str]) -> Check:
    """Whether the environment suits nodes that reach nothing outside: no downloads, no proxy between our processes."""
    proxies = [name for name in environment if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    exempt = environment.get("no_proxy", environment.get("NO_PROXY", ""))
    if proxies and exempt != "*" and not {"localhost", "127.0.0.1"} & set(exempt.replace(" ", "").split(",")):
        message = f"{', '.join(sorted(proxies))} would stand between processes of one node as well"
        return Check("offline", Status.WARN, message, "export no_proxy=localhost,127.0.0.1 and the names of the nodes")
    switched = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if environment.get(name) in ("1", "true")]
    if switched:
        return Check("offline", Status.OK, f"{' and '.join(switched)} set: no library tries to download")
    message = "models and data are directories, nothing is downloaded; HF_HUB_OFFLINE=1 keeps libraries from trying"
    return Check("offline", Status.OK, message)


def _said(command: list[str]) -> str:
    """Output of a command; nothing where it fails."""
    try:
        done = _run(command)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else ""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, stdin=subprocess.DEVNULL)
