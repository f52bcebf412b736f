"""What the script of a job array says and does: golden file, hostile values, and the way to each run's own script.

When a change of the script is meant, write the golden file anew: `python tests/cluster/slurm/test_render_array.py`.
"""

import difflib
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import spec

from miles.cluster.slurm.render import check_script, render_array, render_job
from miles.cluster.slurm.spec import ArraySpec, JobSpec, array_spec
from miles.errors import ConfigError
from miles.runs.paths import RunPaths
from tests.cluster.slurm.test_render import HOSTILE, read_options

GOLDEN = Path(__file__).with_name("golden") / "array.sbatch"
RUNS = Path("/shared/runs")


def member(name: str, **section: object) -> JobSpec:
    return spec(RUNS / name, run=name, **section)


def array(**section: object) -> ArraySpec:
    """Elements 0, 1, 2 and 5 of a sweep."""
    jobs = {index: member(f"demo-seed-{index}", **section) for index in (0, 1, 2, 5)}
    return array_spec("demo", RUNS / "demo.sweep", jobs, at_once=2, dependency="aftercorr:41,afterany:42")


def test_the_script_is_the_recorded_one() -> None:
    recorded, now = GOLDEN.read_text().splitlines(), render_array(array(time="4:00:00")).splitlines()
    difference = "\n".join(difflib.unified_diff(recorded, now, "recorded", "rendered now", lineterm=""))
    assert not difference, f"{difference}\n\nIf this is meant: python tests/cluster/slurm/test_render_array.py"


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    script = render_array(array(time="4:00:00"))
    done = subprocess.run([shellcheck, "--shell=bash", "-"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_an_array_asks_for_what_its_elements_ask_for() -> None:
    asked = {"partition": "preempt", "gpus_per_node": 8, "time": "1:00:00", "extra": {"mail-type": "END"}}
    own = set(read_options(render_job(member("demo-seed-0", **asked))))
    of_array = set(read_options(render_array(array(**asked))))
    assert {option for option in own - of_array if not option.startswith(("--job-name", "--output"))} == set()
    assert of_array - own == {
        "--job-name=demo.grpo",
        "--output=/shared/runs/demo.sweep/slurm-grpo-%j.out",
        "--dependency=aftercorr:41,afterany:42",
        "--kill-on-invalid-dep=yes",
        "--array=0-2,5%2",
    }


def test_elements_that_ask_for_different_things_are_no_array() -> None:
    jobs = {0: member("a", time="1:00:00"), 1: member("b", time="2:00:00")}
    with pytest.raises(ConfigError, match=r"slurm\.time differs between the runs 'a' and 'b'"):
        array_spec("demo", RUNS, jobs, at_once=None, dependency=None)


@settings(max_examples=50, deadline=None)
@given(
    runs=st.lists(HOSTILE.filter(lambda text: text.strip("./")), min_size=1, max_size=3),
    step=HOSTILE,
    comment=HOSTILE,
)
def test_each_element_becomes_its_own_run_whatever_things_are_called(runs: list[str], step: str, comment: str) -> None:
    with tempfile.TemporaryDirectory() as base:
        # The number keeps the directories apart; a script that is found says which run it is of.
        places = [Path(base) / f"{number} {name}".replace("/", "_") for number, name in enumerate(runs)]
        step = step.replace("/", "_")
        jobs = {
            3 * number: replace(
                spec(place, step=step, extra={"comment": comment}), output=place / f"slurm-{step}-%j.out"
            )
            for number, place in enumerate(places)
        }
        try:
            script = render_array(array_spec("demo", Path(base), jobs, at_once=None, dependency=None))
        except ConfigError as error:
            assert "control character" in error.message or "backslash" in error.message
            return
        check_script(script)
        assert f"--comment={comment}" in read_options(script)
        for number, place in enumerate(places):
            paths = RunPaths(place)
            paths.scripts.mkdir(parents=True)
            paths.all_logs.mkdir()
            paths.script(step).write_text(f"#!/bin/bash\necho run {number} $SLURM_JOB_ID\n")
            paths.script(step).chmod(0o700)
            output = Path(base) / f"slurm-{step}-{70 + number}.out"
            output.write_text("from Slurm")
            environment = {"SLURM_ARRAY_TASK_ID": str(3 * number), "SLURM_JOB_ID": str(70 + number)}
            done = subprocess.run(
                ["bash", "-c", script],
                env=os.environ | environment,
                cwd=base,
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.stdout, done.stderr) == (f"run {number} {70 + number}\n", "")
            with output.open("a") as more:
                more.write(", and more")
            assert paths.slurm_log(step, 70 + number).read_text() == "from Slurm, and more"
        assert not list(Path(base).rglob("PWNED"))


def test_a_requeued_element_keeps_its_output(tmp_path: Path) -> None:
    place = tmp_path / "run"
    paths = RunPaths(place)
    paths.scripts.mkdir(parents=True)
    paths.all_logs.mkdir()
    paths.script("grpo").write_text("#!/bin/bash\necho begun ${SLURM_RESTART_COUNT:-0}\n")
    paths.script("grpo").chmod(0o700)
    script = render_array(array_spec("demo", tmp_path, {0: spec(place)}, at_once=None, dependency=None))
    output = tmp_path / "slurm-grpo-7.out"
    for restart in ("0", "1"):
        environment = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restart}
        with output.open("a") as stream:
            subprocess.run(["bash", "-c", script], env=os.environ | environment, stdout=stream, check=True)
    assert paths.slurm_log("grpo", 7).read_text() == "begun 0\nbegun 1\n"


if __name__ == "__main__":
    GOLDEN.write_text(render_array(array(time="4:00:00")))
