"""The command that starts a process of a run inside the step's container.

Owns the words before `python3 -m ...`: what is bound, which environment passes, where temporary files go. Running them
is the batch script's (`srun`) and `miles.cluster.container_check`'s. Inside, every path is the same as outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from miles.config.cluster import ContainerSection
from miles.errors import ConfigError

PASSED_ENVIRONMENT = (
    *("SLURM_*", "SLURMD_NODENAME", "MILES_*"),
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    *("NCCL_*", "RCCL_*", "GLOO_*", "UCX_*", "FI_*", "TORCH_*", "PYTORCH_*", "OMP_NUM_THREADS"),
    *("USER", "LOGNAME", "LANG", "LC_*", "TZ"),
)
"""Variables that reach the container, by name or by the beginning of the name; nothing else does but what is asked for.
"""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
_IMAGE_DIRECTORIES = ("/", "/bin", "/etc", "/lib", "/lib64", "/sbin", "/usr", "/usr/bin", "/usr/lib", "/var")
"""Binding one of these would hide the image's own."""

# Runs on the node, outside the container. Every word of the job's own comes in as "$@" or through the environment, so
# nothing of it is read as shell. TMPDIR is often one of the job's own that the site makes; a name of ours in it keeps
# other users' files, and theirs ours, apart. SLURM_JWT is a key to the cluster.
_SCRATCH = """\
set -u
umask 077
temporary=${{MILES_SCRATCH:-${{TMPDIR:-}}}}
[ -d "$temporary" ] || temporary={scratch}
temporary=$temporary/miles-$(id -u)
mkdir -p "$temporary" && [ -O "$temporary" ] && [ ! -L "$temporary" ] || {{
    echo "miles: $temporary: cannot be made, or belongs to somebody else; set MILES_SCRATCH" >&2
    exit 73
}}
"""
_PASSED_NAMES = (
    "$(awk 'BEGIN {{ for (name in ENVIRON) if (name ~ /^({names})$/ && name != \"SLURM_JWT\") print name }}')"
)
_APPTAINER = """\
for name in {passed}; do
    eval "export {prefix}ENV_$name=\\"\\$$name\\""
done
export {prefix}ENV_TMPDIR="$temporary"
exec {program} exec --bind "$temporary" {home} "$@"
"""
_ENROOT = """\
for name in {passed}; do
    set -- --env "$name" "$@"
done
exec enroot start --env TMPDIR="$temporary" {home} --mount "$temporary:$temporary:none:x-create=dir,rbind" "$@"
"""
_CHARLIECLOUD = """\
export USER="${{USER:-$(id -un)}}" TMPDIR="$temporary"
exec ch-run {home} "$@"
"""


def container_command(
    section: ContainerSection,
    *,
    run_dir: Path,
    paths: Sequence[Path] = (),
    gpus: bool = False,
    scratch: str = "/tmp",
    environment: Sequence[str] = (),
) -> tuple[str, ...]:
    """The words to put before the command of a process, to be executed on each node as they are (no shell reads them).

    Args:
        run_dir: the run directory; bound, and the working directory inside.
        paths: further files and directories that the process reads (models, data, graders); bound.
        gpus: whether the step has GPUs; `container.gpu = "auto"` then brings in their driver.
        scratch: directory of each node for temporary files, where neither MILES_SCRATCH nor TMPDIR names one there.
        environment: names of variables that pass besides `PASSED_ENVIRONMENT`: the job's own, and its secrets.

    Returns: an empty tuple without a container.

    Raises:
        ConfigError: no image; a name or a path that the runtime could misread.
    """
    raise NotImplementedError
