"""Writing a job down: `JobSpec` or `ArraySpec` in, the text of its batch script out.

Owns which options of sbatch a job gets and how values are quoted; what the scripts do is in `sbatch/*.sbatch.j2`.
A value of the run file can neither be executed nor become an option, except slurm.setup, which is shell by its purpose.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError

import miles
from miles.cluster.containers import source_tree
from miles.cluster.slurm.spec import ArraySpec, JobSpec
from miles.config.problems import shown
from miles.config.slurm_options import extra_problems, has_control_characters
from miles.errors import ConfigError
from miles.runs.paths import RunPaths

_JOB, _ARRAY = "job.sbatch.j2", "array.sbatch.j2"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def render_job(spec: JobSpec, template: str | None = None) -> str:
    """The batch script of a job.

    `template`: text of a Jinja2 template; None: the file that slurm.template names, or Miles' own.

    Raises:
        ConfigError: a value that cannot be written into a script, an option that cannot be passed on, or a template
            that is missing, is no Jinja2, or uses a variable that there is not.
    """
    own = spec.section.template
    text = template if template is not None else _read_own(_JOB) if own is None else _read_template(own)
    return _fill(own or f"sbatch/{_JOB}", text, _variables(spec))


def render_array(spec: ArraySpec) -> str:
    """The batch script of a job array, whose elements run the scripts that lie in the directories of their runs.

    Raises ConfigError as `render_job` does. A template of the user's is no matter here.
    """
    job = spec.job
    before, _, after = job.output.name.rpartition("%j")
    assert after == ".out", f"the template names the output {before}NUMBER.out, not {job.output.name}"
    variables: dict[str, object] = {
        "options": [*_options(job), f"--array={_indices(spec)}"],
        "members": {index: _for_shell("a run directory", str(run_dir)) for index, run_dir in spec.members.items()},
        "output_dir": _for_shell("the directory of the output", str(job.output.parent)),
        "log": _for_shell("the name of the step", before),
        "script": _for_shell("the name of the step", RunPaths(job.run_dir).script(job.step).name),
    }
    return _fill(f"sbatch/{_ARRAY}", _read_own(_ARRAY), variables)


def _indices(spec: ArraySpec) -> str:
    """`0-2,5%2`."""
    ranges: list[list[int]] = []
    for index in sorted(spec.members):
        if ranges and index == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], index]
        else:
            ranges.append([index])
    text = ",".join("-".join(map(str, part)) for part in ranges)
    return text if spec.at_once is None else f"{text}%{spec.at_once}"


def _fill(name: str, text: str, variables: dict[str, object]) -> str:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters["sh"] = _sh
    try:
        return environment.from_string(text).render(variables)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{name}:{error.lineno}: not a Jinja2 template: {error.message}", fix="correct it") from None
    except UndefinedError as error:
        fix = f"the variables of a template are {', '.join(variables)} (docs/slurm.md)"
        raise ConfigError(f"{name}: {error.message}", fix=fix) from None
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        message = f"{name}: cannot be rendered: {type(error).__name__}: {error}"
        raise ConfigError(message, fix="docs/slurm.md says what its variables are") from None


def check_script(text: str) -> None:
    """Raise ConfigError when bash cannot read the script: a mistake in slurm.setup or in a template of the user's."""
    bash = shutil.which("bash") or "/bin/bash"
    checked = subprocess.run(
        [bash, "-n"], input=text.encode(errors="surrogateescape"), capture_output=True, check=False, timeout=60
    )
    if checked.returncode:
        said = checked.stderr.decode(errors="replace").strip()
        raise ConfigError(
            f"bash cannot read the batch script: {said}",
            fix="correct slurm.setup or slurm.template; the numbers are lines of what `miles render` prints",
        )


def _variables(spec: JobSpec) -> dict[str, object]:
    """What a template can use, all checked."""
    section = spec.section
    run_dir = _for_shell("the run directory", str(spec.run_dir))
    return {
        "options": list(_options(spec)),
        "setup": "\n".join(map(_setup_lines, section.setup)),
        "environment": {_variable(name): _for_shell(name, value) for name, value in spec.environment.items()},
        "grace": None if section.grace_seconds is None else math.floor(section.grace_seconds),
        "command": [_for_shell("the command", word) for word in spec.command],
        "run": spec.run,
        "step": spec.step,
        "run_dir": run_dir,
        "stop_request": str(RunPaths(spec.run_dir).stop_request),
        "restart": section.restart,
    }


def _read_own(name: str) -> str:
    # `sbatch/` of a checkout is the package `miles.sbatch` once it is installed.
    source = source_tree()
    own = source / "sbatch" if source is not None else Path(miles.__file__).parent / "sbatch"
    return (own / name).read_text(encoding="utf-8")


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        message = f"slurm.template = {shown(path)}: {error.strerror}"
        raise ConfigError(message, fix="name a file, relative to the run file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"slurm.template = {shown(path)}: is not UTF-8", fix="name a text file") from None


def _options(spec: JobSpec) -> Iterator[str]:
    """Options of sbatch, each as it stands behind `#SBATCH`."""
    section = spec.section
    yield _option("job-name", f"{spec.run}.{spec.step}", key="name")
    for name in ("partition", "account", "qos", "reservation", "constraint", "time"):
        if (value := getattr(section, name)) is not None:
            yield _option(name, value, key=f"slurm.{name}")
    yield _option("nodes", spec.nodes, key="slurm.nodes")
    if spec.nodes.isdecimal():
        # With a range, Slurm would never give more than the least: it takes the tasks of that many nodes for all.
        yield "--ntasks-per-node=1"
    if section.cpus_per_node is not None:
        yield f"--cpus-per-task={section.cpus_per_node}"
    if section.memory_per_node is not None:
        yield _option("mem", section.memory_per_node, key="slurm.memory_per_node")
    if spec.needs_ranks and section.gpus_per_node:
        gpus = ["gpu", *([section.gpu_type] if section.gpu_type else []), str(section.gpus_per_node)]
        yield _option("gres", ":".join(gpus), key="slurm.gpu_type")
    if section.exclusive:
        yield "--exclusive"
    if spec.dependency is not None:
        yield _option("dependency", spec.dependency, key="the dependency")
        yield "--kill-on-invalid-dep=yes"
    yield "--requeue" if section.restart == "requeue" else "--no-requeue"
    yield f"--signal=B:USR1@{math.ceil(section.save_lead_minutes * 60)}"
    yield _option("output", _output_pattern(spec), key="runs_dir")
    yield "--open-mode=append"
    yield "--export=ALL"  # of what sbatch gets: miles.cluster.slurm.environment
    for _, message, fix in extra_problems(section.extra):
        raise ConfigError(message, fix=fix)
    for name, given in section.extra.items():
        yield f"--{name}" if given is True else _option(name, str(given), key=f"slurm.extra.{name}")


def _option(name: str, value: str, *, key: str) -> str:
    """`--name=value` as sbatch reads it back from a line: it knows double quotes and backslashes, and no expansion."""
    if has_control_characters(value):
        message = f"{key} = {shown(value)}: a line break or control character in an option of sbatch"
        raise ConfigError(message, fix="write it on one line")
    if re.fullmatch(r"[A-Za-z0-9_./:,@%+-]+", value):
        return f"--{name}={value}"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{name}="{quoted}"'


def _output_pattern(spec: JobSpec) -> str:
    """The output file as a pattern of sbatch, in which nothing but the name stands for something else."""
    directory = str(spec.output.parent)
    if "\\" in directory:
        # sbatch would then fill in nothing, and write to a file that is called `%j`.
        raise ConfigError(f"the run directory {directory} has a backslash in it", fix="choose another runs_dir")
    return f"{directory.replace('%', '%%')}/{spec.output.name}"


def _setup_lines(text: str) -> str:
    if has_control_characters(text.replace("\n", "").replace("\t", "")):
        raise ConfigError(f"slurm.setup: a control character in {shown(text)}", fix="write plain shell lines")
    return text


def _for_shell(what: str, value: str) -> str:
    if "\0" in value or "\r" in value:  # sbatch refuses scripts with carriage returns
        raise ConfigError(f"{what}: {shown(value)} holds a control character", fix="remove it")
    return value


def _variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ConfigError(f"{shown(name)} is not the name of an environment variable", fix="use letters, digits and _")
    return name


def _sh(value: str | Sequence[str]) -> str:
    """Filter of the templates: a word, or a list of words, for the shell."""
    return shlex.quote(value) if isinstance(value, str) else shlex.join(value)
