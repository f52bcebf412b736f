"""Does a step's container work on this machine? Each question is one check with a remedy.

Owns the questions and asks them through the same words that a job uses (`miles.cluster.containers`). What is asked on
a login node says nothing of a node's GPUs: the same command runs in an allocation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import miles
from miles.cluster.containers import PROGRAMS, container_command, source_tree, version_command, wanted_gpu
from miles.config.cluster import ContainerSection
from miles.config.file_checks import is_looked_up
from miles.config.schema import RunConfig
from miles.workflow.fingerprint import user_paths

_TIMEOUT = 300.0
"""Seconds; an image that is unpacked first takes a minute."""
_MINIMUM = (3, 11)

# Old enough for any Python 3. The GPU is asked of the driver itself: that is what the bound libraries must answer.
_PROBE = """
import ctypes, importlib.util, json, os, sys, tempfile
found = {"python": list(sys.version_info[:3]), "executable": sys.executable}
try:
    import miles
    found["miles"] = miles.__version__
    found["where"] = os.path.dirname(miles.__file__)
except Exception as error:
    found["miles_error"] = "%s: %s" % (type(error).__name__, error)
found["missing"] = [name for name in ("torch", "transformers", "pydantic", "h5py", "aiohttp", "xxhash", "psutil")
                    if importlib.util.find_spec(name) is None]
for name, path in (("run_dir", sys.argv[1]), ("scratch", tempfile.gettempdir())):
    try:
        with tempfile.TemporaryFile(dir=path):
            found[name] = path
    except Exception as error:
        found[name + "_error"] = "%s: %s" % (type(error).__name__, error)
found["unseen"] = [path for path in sys.argv[2:] if not os.path.exists(path)]
try:
    count = ctypes.c_int(0)
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    found["gpus"] = count.value if code == 0 else 0
    if code:
        found["gpus_error"] = "the driver answers with error %d" % code
except OSError as error:
    found["gpus"] = 0
    found["gpus_error"] = str(error)
found["rocm"] = os.access("/dev/kfd", os.R_OK | os.W_OK)
print(json.dumps(found))
"""


class Outcome(StrEnum):
    OK = "ok"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """The answer to one question. `remedy` says what to do where it failed."""

    name: str
    outcome: Outcome
    message: str
    remedy: str | None = None


def check_run(config: RunConfig) -> Iterator[tuple[str, Check]]:
    """The checks of every container of a run, each with the names of the steps that use it, as they are answered.

    Writes nothing that stays, but for the directory of the runs where it does not exist.
    """
    root = Path(config.runs_dir).absolute()
    root.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, bool, str], list[str]] = {}
    for name, step in config.steps.items():
        if step.container.runtime != "none":
            key = (step.container.model_dump_json(), step.slurm.gpus_per_node > 0, step.slurm.python or "python3")
            groups.setdefault(key, []).append(name)
    for (_, gpus, python), names in groups.items():
        steps = [config.steps[name] for name in names]
        wanted = dict.fromkeys(path for step in steps for path in user_paths(step))
        paths = [path for path in wanted if path.exists()]
        with tempfile.TemporaryDirectory(prefix=".check-", dir=root) as directory:
            for check in check_container(
                steps[0].container, run_dir=Path(directory), paths=paths, gpus=gpus, python=python
            ):
                yield ", ".join(names), check


def check_container(
    section: ContainerSection, *, run_dir: Path, paths: Sequence[Path], gpus: bool, python: str = "python3"
) -> Iterator[Check]:
    """Ask everything, in order, each as soon as it is known; ends early where nothing further can be asked.

    Args:
        section: of a step with a runtime.
        run_dir: an existing directory on the file system of the run.
        paths: what the step reads, all existing.
        gpus: whether the step wants GPUs.
        python: the Python of the jobs inside.

    Raises:
        ConfigError: the section itself is wrong.
    """
    command = container_command(section, run_dir=run_dir, paths=paths, gpus=gpus)
    yield (found := _runtime(section.runtime))
    if found.outcome is Outcome.FAILED:
        return
    yield (found := _image(section))
    if found.outcome is Outcome.FAILED:
        return
    yield (found := _starts(command, section.runtime))
    if found.outcome is Outcome.FAILED:
        return
    done = _run([*command, python, "-c", _PROBE, str(run_dir), *map(str, paths)])
    answers = _answers(done)
    if answers is None:
        fix = f"install Python {_dotted(_MINIMUM)} or newer in the image, or name it in slurm.python"
        yield Check("python", Outcome.FAILED, f"{python} cannot be asked: {_tail(done)}", fix)
        return
    yield from _judge(answers, wanted_gpu(section, gpus))


def _runtime(runtime: str) -> Check:
    program = PROGRAMS[runtime]
    where = shutil.which(program)
    if where is None:
        fix = f"load its module (`module avail {runtime}`; for jobs in slurm.setup), or ask the staff what there is"
        return Check("runtime", Outcome.FAILED, f"{program} is not on PATH", fix)
    done = _run(version_command(runtime))
    version = (done.stdout or done.stderr).strip().splitlines()
    return Check("runtime", Outcome.OK, f"{version[0] if version else program} ({where})")


def _image(section: ContainerSection) -> Check:
    image = section.image or ""
    if is_looked_up(section):
        return Check("image", Outcome.OK, f"{image}, which the runtime looks up itself")
    path = Path(image)
    if not path.exists():
        fix = f"`miles container build {image}` makes one; or correct container.image"
        return Check("image", Outcome.FAILED, f"{image}: no such file or directory", fix)
    if not os.access(path, os.R_OK):
        return Check("image", Outcome.FAILED, f"{image} cannot be read", "ask its owner for permission to read it")
    return Check("image", Outcome.OK, image)


def _starts(command: Sequence[str], runtime: str) -> Check:
    done = _run([*command, "true"])
    if done.returncode == 0:
        return Check("start", Outcome.OK, "a process starts in it")
    fix = "read the runtime's message; directories that it cannot bind are run directory, model and data"
    if runtime == "charliecloud":
        fix = "each directory that is bound must exist in the image (mkdir -p in it), or the image must be writable"
    return Check("start", Outcome.FAILED, f"exit code {done.returncode}: {_tail(done)}", fix)


def _judge(answers: dict[str, Any], gpu: str) -> Iterator[Check]:
    version = tuple(answers["python"])
    good = version >= _MINIMUM
    yield Check(
        "python",
        Outcome.OK if good else Outcome.FAILED,
        f"Python {_dotted(version)} ({answers['executable']})",
        None if good else f"Miles needs {_dotted(_MINIMUM)} or newer: name another in slurm.python, or another image",
    )
    yield _miles(answers)
    if answers["missing"]:
        fix = "build the image from containers/requirements.txt"
        yield Check("packages", Outcome.FAILED, f"missing inside: {', '.join(answers['missing'])}", fix)
    for name, what, fix in (
        ("run_dir", "run directory", "see that its file system is mounted on this node and not bound read-only"),
        ("scratch", "scratch", "set MILES_SCRATCH to a directory of the node that you can write"),
    ):
        if name in answers:
            yield Check(what, Outcome.OK, f"{answers[name]} can be written")
        else:
            yield Check(what, Outcome.FAILED, answers[f"{name}_error"], fix)
    if answers["unseen"]:
        fix = "see that its file system is mounted on this node; bind what it links to in container.binds"
        yield Check("inputs", Outcome.FAILED, f"not seen inside: {', '.join(answers['unseen'])}", fix)
    else:
        yield Check("inputs", Outcome.OK, "models and data are seen inside")
    if gpu != "none":
        yield _gpu(answers, gpu)


def _miles(answers: dict[str, Any]) -> Check:
    fix = "build the image anew from this version: `miles container build IMAGE`"
    if "miles" not in answers:
        return Check("miles", Outcome.FAILED, f"cannot be imported: {answers['miles_error']}", fix)
    if answers["miles"] != miles.__version__:
        message = f"version {answers['miles']} inside, {miles.__version__} outside"
        return Check("miles", Outcome.FAILED, message, fix)
    where = "this checkout" if source_tree() is not None else "the image"
    return Check("miles", Outcome.OK, f"version {answers['miles']}, of {where} ({answers['where']})")


def _gpu(answers: dict[str, Any], gpu: str) -> Check:
    if gpu == "rocm":
        if answers["rocm"]:
            return Check("gpu", Outcome.OK, "/dev/kfd is there")
        return Check("gpu", Outcome.FAILED, "no /dev/kfd inside", "ask again on a node with a GPU")
    if answers["gpus"]:
        return Check("gpu", Outcome.OK, f"{answers['gpus']} seen inside")
    fix = "on a login node without GPUs, ask again in an allocation: `srun --gpus=1 miles container check FILE`"
    return Check("gpu", Outcome.FAILED, f"none seen inside: {answers.get('gpus_error', 'the driver lists none')}", fix)


def _answers(done: subprocess.CompletedProcess[str]) -> dict[str, Any] | None:
    """What the probe printed last; a runtime may print before it. None: it did not come so far."""
    lines = done.stdout.strip().splitlines()
    try:
        return dict(json.loads(lines[-1])) if done.returncode == 0 and lines else None
    except ValueError:
        return None


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {_TIMEOUT:.0f} s")


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return " / ".join(lines[-3:]) or f"exit code {done.returncode}"


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
