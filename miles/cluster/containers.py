"""The command that starts a process of a run inside the step's container.

Owns the words before `python3 -m ...`: what is bound, which environment passes, where temporary files go. Running them
is the batch script's (`srun`) and `miles.cluster.container_check`'s. Inside, every path is the same as outside.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import miles
from miles.config.cluster import ContainerSection
from miles.errors import ConfigError

PROGRAMS = {"apptainer": "apptainer", "singularity": "singularity", "enroot": "enroot", "charliecloud": "ch-run"}
"""The program of each runtime."""

CACHES = ("TRITON_*", "TORCHINDUCTOR_*", "FLASHINFER_*", "SGLANG_*")
"""Variables by which the batch script moves caches into MILES_SCRATCH."""

PASSED_ENVIRONMENT = (
    *("SLURM_*", "SLURMD_NODENAME", "MILES_*"),
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    *("NCCL_*", "RCCL_*", "GLOO_*", "UCX_*", "FI_*", "TORCH_*", "PYTORCH_*", "OMP_NUM_THREADS"),
    *("USER", "LOGNAME", "LANG", "LC_*", "TZ"),
    *CACHES,
)
"""Variables that reach the container, by name or by the beginning of the name; others only where a run asks for them.
"""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
_MISREAD = re.compile(r"[:,\\\n]")
_IMAGE_DIRECTORIES = frozenset(
    map(Path, ("/", "/bin", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr", "/usr/bin", "/usr/lib"))
)
"""A bind over one of these would hide the image's own."""

# The beginning of what runs on the node, outside the container, in /bin/sh. Words of the run reach it as "$@" only, so
# that none is read as shell. Without the batch script's own directory, one by the user's number: /tmp is everybody's.
_BEGIN = """\
set -u
base=${TMPDIR:-}
[ -d "$base" ] || base=%(scratch)s
scratch=${MILES_SCRATCH:-$base/miles-$(id -u)}
(umask 077 && mkdir -p "$scratch")
if [ ! -O "$scratch" ] || [ -L "$scratch" ]; then
    echo "miles: $scratch cannot be made or is somebody else's: set MILES_SCRATCH to a directory of the node" >&2
    exit 73
fi
if ! command -v %(program)s >/dev/null; then
    echo "miles: %(program)s is not on the PATH of the job: load it in slurm.setup, as in [\\"module load ...\\"]" >&2
    exit 127
fi
"""
# SLURM_JWT is a key to the cluster that nothing inside needs.
_FOR_EACH_PASSED = """\
for name in $(awk 'BEGIN { for (name in ENVIRON) if (name ~ /^(%(names)s)$/ && name != "SLURM_JWT") print name }'); do
"""
# The runtime evaluates values as shell where it is not told not to, and a secret may hold a dollar.
_APPTAINER = """\
    eval "export %(prefix)sENV_$name=\\"\\$$name\\""
done
export %(prefix)sENV_TMPDIR="$scratch" %(prefix)sENV_MILES_SCRATCH="$scratch" %(prefix)s_NO_EVAL=1
exec %(runtime)s exec --cleanenv %(home)s --bind "$scratch" "$@"
"""
_ENROOT = """\
    set -- --env "$name" "$@"
done
export ENROOT_MOUNT_HOME=%(mount_home)s
set -- %(home)s --env "TMPDIR=$scratch" --env "MILES_SCRATCH=$scratch" "$@"
exec enroot start --mount "$scratch:$scratch:none:x-create=dir,rbind" "$@"
"""
# ch-run mounts TMPDIR of the node as /tmp, and takes over the PATH of the node.
_CHARLIECLOUD = """\
export USER="${USER:-$(id -un)}" TMPDIR="${scratch%%/*}"
inside=/tmp/${scratch##*/}
exec ch-run --unset-env='!(%(globs)s)' --unset-env=SLURM_JWT %(home)s --set-env="TMPDIR=$inside" \\
    --set-env="MILES_SCRATCH=$inside" --set-env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
"""


@dataclass(frozen=True, slots=True)
class Bind:
    """One directory or file of the node, and where it is seen inside."""

    source: Path
    target: Path
    read_only: bool = False


def container_command(
    section: ContainerSection,
    *,
    run_dir: Path,
    paths: Sequence[Path] = (),
    gpus: bool = False,
    scratch: str = "/tmp",
    environment: Sequence[str] = (),
) -> tuple[str, ...]:
    """The words to put before the command of a process, executed on each node as they are (no shell may read them).

    The first words are a small script of /bin/sh, which looks up on the node what only the node knows (the variables
    that Slurm sets for the task, its scratch directory), and then becomes the runtime.

    Args:
        run_dir: the run directory; bound, and the working directory inside.
        paths: further files and directories that the process reads; bound. Of a step: `fingerprint.user_paths`.
        gpus: whether the step has GPUs; `container.gpu = "auto"` then brings in their driver.
        scratch: directory of each node that temporary files go below, where TMPDIR names none. MILES_SCRATCH, which the
            batch script sets to a directory of the job's own, goes before both, and is bound as it is.
        environment: names of variables that pass besides `PASSED_ENVIRONMENT`: the job's own, and its secrets.

    Returns: an empty tuple without a container.

    Raises:
        ConfigError: no image, or a name or path that the runtime would misread.
    """
    if section.runtime == "none":
        return ()
    image = _image(section)
    source = source_tree()
    own = [run_dir, *paths, *([] if source is None else [source])]
    binds = bound(own, section.binds)
    names = _names((*PASSED_ENVIRONMENT, *environment, *section.env))
    runtime = {"enroot": _enroot, "charliecloud": _charliecloud}.get(section.runtime, _apptainer)
    script, arguments = runtime(section, binds, gpus, names)
    inside = ["env", f"--chdir={run_dir.absolute()}", "PYTHONNOUSERSITE=1"]
    if source is not None:
        inside.append(f"PYTHONPATH={source}")
    end = ["--"] if section.runtime == "charliecloud" else []
    begin = _BEGIN % {"scratch": shlex.quote(scratch), "program": PROGRAMS[section.runtime]}
    return ("/bin/sh", "-c", begin + script, "miles-container", *arguments, *section.extra_args, image, *end, *inside)


def version_command(runtime: str) -> list[str]:
    """What asks a runtime's program for its version."""
    return [PROGRAMS[runtime], "version" if runtime == "enroot" else "--version"]


def wanted_gpu(section: ContainerSection, gpus: bool) -> Literal["nvidia", "rocm", "none"]:
    """Whose driver the container needs, for a step with GPUs or without."""
    if section.gpu != "auto":
        return section.gpu
    return "nvidia" if gpus else "none"


def source_tree() -> Path | None:
    """The checkout that this Miles runs from, which then runs in the container too; None for an installed one."""
    root = Path(miles.__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def bound(paths: Iterable[Path], given: Sequence[str]) -> tuple[Bind, ...]:
    """Everything to bind: `paths` where they are, each once, and the user's `HOST[:CONTAINER[:ro]]`, which win.

    A link, or a directory of links such as a snapshot of the Hugging Face cache, comes with what it points to.
    """
    wished = [_parse(text) for text in given]
    taken = {bind.target for bind in wished}
    found = {path for each in paths for path in _with_link_targets(each)}
    for path in sorted(found & _IMAGE_DIRECTORIES):
        raise ConfigError(f"{path} bound into a container would hide the image's own", fix="move the data elsewhere")
    outer = (path for path in sorted(found) if not any(parent in found for parent in path.parents))
    binds = (*(Bind(path, path) for path in outer if path not in taken), *wished)
    for path in (path for bind in binds for path in (bind.source, bind.target)):
        if _MISREAD.search(str(path)):
            message = f"{str(path)!r} cannot be bound into a container"
            raise ConfigError(message, fix="give it a name without colon, comma, backslash and newline")
    return binds


def _with_link_targets(path: Path) -> Iterator[Path]:
    path = Path(os.path.normpath(path.absolute()))
    yield path
    real = path.resolve()
    if real != path:
        yield real
    if not real.is_dir():
        return
    for entry in real.iterdir():
        if entry.is_symlink() and (target := entry.resolve()).exists() and not target.is_relative_to(real):
            yield target if target.is_dir() or target.parent in _IMAGE_DIRECTORIES else target.parent


def _parse(text: str) -> Bind:
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not source.startswith("/") or (target and not target.startswith("/")) or mode not in ("", "ro", "rw"):
        message = f'container.binds: "{text}" is not HOST[:CONTAINER[:ro]] with absolute paths'
        raise ConfigError(message, fix='for example "/data/corpora:/data:ro"')
    return Bind(Path(source), Path(target or source), mode == "ro")


def _image(section: ContainerSection) -> str:
    if not section.image:
        message = f'container.runtime = "{section.runtime}" needs container.image'
        raise ConfigError(message, fix="name the image; `miles container build IMAGE` makes one")
    if section.image.startswith("-"):
        raise ConfigError(f'container.image = "{section.image}" begins with a dash', fix="name its path")
    return section.image


def _names(names: Iterable[str]) -> tuple[str, ...]:
    for name in names:
        if not _NAME.fullmatch(name):
            message = f'"{name}" is not the name of an environment variable, nor the beginning of one and a *'
            raise ConfigError(message, fix="correct container.env")
    return tuple(dict.fromkeys(names))


def _for_each_passed(names: Iterable[str]) -> str:
    return _FOR_EACH_PASSED % {"names": "|".join(name.replace("*", ".*") for name in names)}


_Words = tuple[str, list[str]]
"""The end of the script, and the runtime's arguments."""


def _apptainer(section: ContainerSection, binds: Sequence[Bind], gpus: bool, names: Sequence[str]) -> _Words:
    flags = {"nvidia": ["--nv"], "rocm": ["--rocm"], "none": []}[wanted_gpu(section, gpus)]
    words = [word for bind in binds for word in ("--bind", _colons(bind) + (":ro" if bind.read_only else ""))]
    script = _for_each_passed(names) + _APPTAINER % {
        "runtime": section.runtime,
        "prefix": section.runtime.upper(),
        "home": "" if section.home else '--no-mount home,cwd --home "$scratch"',
    }
    return script, [*flags, *words]


def _enroot(section: ContainerSection, binds: Sequence[Bind], gpus: bool, names: Sequence[str]) -> _Words:
    wanted = wanted_gpu(section, gpus)
    visible = "all" if wanted == "nvidia" else "void"
    words = ["--env", f"NVIDIA_VISIBLE_DEVICES={visible}", "--env", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]
    devices = [Bind(path, path) for path in (Path("/dev/kfd"), Path("/dev/dri")) if wanted == "rocm"]
    for bind in (*devices, *binds):
        if re.search(r"\s", _colons(bind)):
            raise ConfigError(f"enroot cannot bind a path with a space: {_colons(bind)!r}", fix="give it another name")
        words += ["--mount", f"{_colons(bind)}:none:x-create=auto,rbind" + (",ro" if bind.read_only else "")]
    mount_home, home = ("y", "") if section.home else ("n", '--env "HOME=$scratch"')
    return _for_each_passed(names) + _ENROOT % {"mount_home": mount_home, "home": home}, words


def _charliecloud(section: ContainerSection, binds: Sequence[Bind], gpus: bool, names: Sequence[str]) -> _Words:
    for bind in binds:
        if bind.read_only:
            raise ConfigError(f"charliecloud cannot bind {bind.source} read-only", fix="leave out `:ro`")
    words = [word for bind in binds for word in ("--bind", _colons(bind))]
    home = "--home" if section.home else '--set-env="HOME=$inside"'
    # The scratch directory has another path inside, so caches are left to lie in HOME, which is there.
    passed = "|".join(name for name in (*names, "HOME") if name not in CACHES and not name.startswith("TORCH"))
    script = _CHARLIECLOUD % {"globs": passed, "home": home}
    return script, words


def _colons(bind: Bind) -> str:
    return f"{bind.source}:{bind.target}"
