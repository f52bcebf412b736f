"""What a batch script says: golden files, and values of the run file that try to be more than values.

When a change of the scripts is meant, write the golden files anew: `python tests/cluster/slurm/test_render.py`.
"""

import difflib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import run, spec

from miles.cluster.slurm.render import check_script, render_job
from miles.cluster.slurm.spec import JobSpec
from miles.config.slurm_options import KNOWN, OWN
from miles.errors import ConfigError

GOLDEN = Path(__file__).with_name("golden")
JOBS: dict[str, JobSpec] = {
    "smallest": spec(),
    "requeue": spec(
        nodes="2-4",
        partition="preempt",
        account="lab",
        time="4:00:00",
        gpus_per_node=8,
        gpu_type="h100",
        cpus_per_node=96,
        memory_per_node="1500G",
        setup=["module load cuda/12", "ulimit -n 65536"],
        extra={"mail-type": "END,FAIL", "comment": 'RL of Anna\'s "demo"', "contiguous": True},
        dependency="afterok:41:42,afterany:43",
    ),
    "chain": spec(restart="chain", qos="long", exclusive=True, grace_seconds=90.0, save_lead_minutes=2.5),
    "without-ranks": spec(needs_ranks=False, restart="none", gpus_per_node=8),
    "container": spec(
        command=("/bin/sh", "-c", 'exec apptainer exec "$@"', "miles-container", "miles.sif", "python3", "-m", "x"),
        environment={},
    ),
}


def read_options(script: str) -> list[str]:
    """Options as sbatch reads them (opt.c, and tried on the real one in tests/slurm/test_batch_job.py)."""
    words = []
    for line in script.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            words += _words(line.removeprefix("#SBATCH"))
    return words


def _words(text: str) -> list[str]:
    words: list[str] = []
    word, quote, escaped = "", "", False
    for letter in text:
        if escaped:
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = True
        elif quote and letter == quote:
            quote = ""
        elif not quote and letter in "'\"":
            quote = letter
        elif not quote and letter == "#":
            break
        elif not quote and letter in " \t":
            words, word = words + [word] * bool(word), ""
        else:
            word += letter
    return words + [word] * bool(word)


@pytest.mark.parametrize("name", JOBS)
def test_the_script_is_the_recorded_one(name: str) -> None:
    file = GOLDEN / f"{name}.sbatch"
    recorded, now = file.read_text().splitlines(), render_job(JOBS[name]).splitlines()
    difference = "\n".join(difflib.unified_diff(recorded, now, f"recorded: {file.name}", "rendered now", lineterm=""))
    assert not difference, f"{difference}\n\nIf this is meant: python tests/cluster/slurm/test_render.py"


@pytest.mark.parametrize("name", JOBS)
def test_shellcheck_finds_nothing(name: str) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [shellcheck, "--shell=bash", "-"], input=render_job(JOBS[name]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_step_without_ranks_asks_for_no_gpu() -> None:
    assert not any("gres" in option for option in read_options(render_job(JOBS["without-ranks"])))


LETTERS = st.sampled_from(
    [*"ab-= \t'\"\\$(){}`;&|<>#%!*?[]~\n\r:,é", "$(touch PWNED)", "`touch PWNED`", "\n#SBATCH ", "--uid=0"]
)
HOSTILE = st.lists(LETTERS, max_size=12).map("".join)
TEXTS = ("partition", "account", "qos", "reservation", "constraint")


@settings(max_examples=300, deadline=None)
@given(
    texts=st.dictionaries(st.sampled_from(TEXTS), HOSTILE),
    names=st.tuples(HOSTILE, HOSTILE),
    extra=st.dictionaries(st.sampled_from(["comment", "mail-user", "nodelist"]), HOSTILE),
    dependency=st.none() | HOSTILE,
)
def test_no_value_becomes_another_option(
    texts: dict[str, str], names: tuple[str, str], extra: dict[str, str], dependency: str | None
) -> None:
    name, step = names
    try:
        script = render_job(spec(**texts, run=name, step=step, extra=extra, dependency=dependency))
    except ConfigError as error:
        assert "control character" in error.message
        return
    check_script(script)
    wanted = {f"--{key}={value}" for key, value in (texts | extra).items()} | {f"--job-name={name}.{step}"}
    if dependency is not None:
        wanted |= {f"--dependency={dependency}", "--kill-on-invalid-dep=yes"}
    plain = set(read_options(render_job(spec()))) - {"--job-name=demo.grpo"}
    assert set(read_options(script)) == wanted | plain


PROBE = """
import json, os, sys
record = os.environ["RECORD"]
json.dump([sys.argv[1:], os.environ.get("GIVEN")], open(record + "/seen", "w"))
"""


@settings(max_examples=30, deadline=None)
@given(words=st.lists(HOSTILE, max_size=3), value=HOSTILE, directory=HOSTILE.filter(lambda text: text.strip("./")))
def test_nothing_of_a_value_is_executed(words: list[str], value: str, directory: str) -> None:
    with tempfile.TemporaryDirectory() as base:
        place = Path(base)
        job = spec(
            place / directory.replace("/", "_"),
            command=(sys.executable, "-c", PROBE, *words),
            environment={"GIVEN": value},
            restart="requeue",
            extra={"comment": "$(touch PWNED)"},
        )
        try:
            render_job(job)
        except ConfigError as error:
            assert "control character" in error.message or "backslash" in error.message
            return
        code, output, script = run(job, place)
        assert code == 0, output
        assert json.loads((script.record / "seen").read_text()) == [words, value]
        assert script.srun_arguments()[-len(job.command) :] == list(job.command)
        assert not list(place.rglob("PWNED"))


@pytest.mark.parametrize(
    ("values", "message", "fix"),
    [
        ({"partition": "a\n#SBATCH --uid=0"}, 'slurm.partition = "a\\n#SBATCH --uid=0": a line break', "one line"),
        ({"run": "a\nb"}, 'name = "a\\nb.grpo": a line break', "one line"),
        ({"extra": {"comment": "a\x1b[2J"}}, "slurm.extra.comment = ", "one line"),
        ({"extra": {"partition": "x"}}, "slurm.extra.partition: Miles sees to --partition itself", "slurm.partition"),
        ({"extra": {"gpus": 8}}, "slurm.extra.gpus: Miles sees to --gpus itself", "slurm.gpus_per_node"),
        ({"extra": {"mail-typ": "END"}}, "sbatch has no such option. Did you mean 'mail-type'?", "long name"),
        ({"extra": {"p": "x"}}, "slurm.extra.p: sbatch has no such option", "long name"),
        ({"extra": {"comment": True}}, "slurm.extra.comment = true: --comment takes a value", 'comment = "..."'),
        ({"extra": {"hold": "yes"}}, "--hold takes no value", "hold = true"),
        ({"extra": {"hold": False}}, "options are not switched off", "leave it out"),
        ({"environment": {"A B": "x"}}, '"A B" is not the name of an environment variable', "letters"),
        ({"command": ("a\0b",)}, "the command: ", "remove it"),
        ({"setup": ["echo \x1b"]}, "slurm.setup: a control character", "plain"),
    ],
)
def test_what_cannot_be_written_down_is_refused_by_its_key(values: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        render_job(spec(**values))
    assert message in caught.value.message
    assert fix in (caught.value.fix or "")


def test_percent_signs_of_the_run_directory_stand_for_themselves() -> None:
    options = read_options(render_job(spec(Path("/runs/100%j %%"))))
    assert "--output=/runs/100%%j %%%%/logs/slurm-grpo-%j.out" in options


def test_every_option_that_miles_sets_is_refused_in_extra() -> None:
    for job in JOBS.values():
        own = {option.removeprefix("--").partition("=")[0] for option in read_options(render_job(job))}
        assert own - set(OWN) == set(job.section.extra)


def test_options_of_the_installed_sbatch_are_known() -> None:
    manual = sbatch_help()
    assert manual <= KNOWN, sorted(manual - KNOWN)


def sbatch_help() -> set[str]:
    """Long options that the sbatch of this machine lists."""
    if shutil.which("sbatch") is None:
        pytest.skip("Slurm is not installed")
    with tempfile.TemporaryDirectory() as directory:
        conf = Path(directory) / "slurm.conf"
        conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=p Nodes=n1\n")
        done = subprocess.run(
            ["sbatch", "--help"], env={"SLURM_CONF": str(conf)}, capture_output=True, text=True, check=True
        )
    words = (line.split("--", 1)[1] for line in done.stdout.splitlines() if line.lstrip().startswith("-"))
    return {word.split()[0].split("=")[0].split("[")[0] for word in words if word}


def test_a_template_of_ones_own_takes_the_place_of_ours(tmp_path: Path) -> None:
    template = tmp_path / "mine.j2"
    template.write_text(
        "#!/bin/bash\n{% for option in options %}\n#SBATCH {{ option }}\n{% endfor %}\nsrun {{ command | sh }}\n"
    )
    script = render_job(spec(template=str(template), partition="a b"))
    assert "--partition=a b" in read_options(script)
    assert script.endswith("srun /env/bin/python -m miles.cluster.node --run-dir /shared/runs/demo --step grpo\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ partitoin }}", "mine.j2: 'partitoin' is undefined"),
        ("a\n{% if %}", "mine.j2:2: not a Jinja2 template"),
        ("{{ command.nothing.at_all }}", "mine.j2: 'list object' has no attribute 'nothing'"),
        ("{{ 1 // 0 }}", "mine.j2: cannot be rendered: ZeroDivisionError"),
        ("{{ options | nothing }}", "mine.j2:1: not a Jinja2 template: No filter named 'nothing'"),
        (None, "no such file"),
    ],
)
def test_a_mistake_in_a_template_is_one_clear_error(tmp_path: Path, text: str | None, message: str) -> None:
    template = tmp_path / "mine.j2"
    if text is not None:
        template.write_text(text)
    with pytest.raises(ConfigError) as caught:
        render_job(spec(template=str(template)))
    assert message.lower() in caught.value.message.lower()
    assert caught.value.fix


def test_an_undefined_variable_comes_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        render_job(spec(), template="{{ partitoin }}")
    assert "options, setup, environment, grace, command" in (caught.value.fix or "")


def test_a_script_that_bash_cannot_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="bash cannot read the batch script"):
        check_script(render_job(spec(setup=["if true; then"])))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, job in JOBS.items():
        (GOLDEN / f"{name}.sbatch").write_text(render_job(job))
