"""The checks of a container, with a stand-in for the runtime that starts the process without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from miles.cluster.container_build import build_image
from miles.cluster.container_check import Check, Outcome, check_container, check_run
from miles.config.cluster import ContainerSection
from miles.config.load import load_run
from miles.errors import MilesError, RunError

WITHOUT_CONTAINER = """#!/bin/sh
[ "$1" = --version ] && echo "apptainer version 9" && exit
while [ "$1" != env ]; do shift; done
exec "$@"
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program `apptainer`; a test may write another."""
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text(WITHOUT_CONTAINER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return program


@pytest.fixture
def section(tmp_path: Path) -> ContainerSection:
    (tmp_path / "miles.sif").touch()
    return ContainerSection(runtime="apptainer", image=str(tmp_path / "miles.sif"), gpu="none")


def last(section: ContainerSection, run_dir: Path, python: str = sys.executable) -> Check:
    """The last answer, the one before which all is well."""
    *before, found = check_container(section, run_dir=run_dir, paths=[], gpus=False, python=python)
    assert {check.outcome for check in before} <= {Outcome.OK}
    return found


@pytest.mark.usefixtures("runtime")
def test_all_is_well(section: ContainerSection, tmp_path: Path) -> None:
    found = list(check_container(section, run_dir=tmp_path, paths=[tmp_path], gpus=False, python=sys.executable))
    assert {check.outcome for check in found} == {Outcome.OK}
    assert "apptainer version 9" in found[0].message


def test_what_keeps_a_process_from_starting_is_shown(section: ContainerSection, tmp_path: Path, runtime: Path) -> None:
    runtime.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "FATAL: no such mount" >&2; exit 255\n')
    found = last(section, tmp_path)
    assert (found.name, found.message) == ("start", "exit code 255: FATAL: no such mount")
    assert found.remedy is not None


@pytest.mark.usefixtures("runtime")
def test_an_image_without_python(section: ContainerSection, tmp_path: Path) -> None:
    found = last(section, tmp_path, python="python9")
    assert found.name == "python" and "python9" in found.message and "slurm.python" in (found.remedy or "")


def test_another_version_of_miles_inside(section: ContainerSection, tmp_path: Path, runtime: Path) -> None:
    (tmp_path / "other" / "miles").mkdir(parents=True)
    (tmp_path / "other" / "miles" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    inside = (
        f'cd /; while case $1 in env|*=*) ;; *) false;; esac; do shift; done; PYTHONPATH={tmp_path}/other exec "$@"'
    )
    runtime.write_text(WITHOUT_CONTAINER.replace('exec "$@"', inside))
    checks = check_container(section, run_dir=tmp_path, paths=[], gpus=False, python=sys.executable)
    found = {check.name: check for check in checks}
    assert found["miles"].outcome is Outcome.FAILED
    assert found["miles"].message.startswith("version 0.0.1 inside")


@pytest.mark.usefixtures("runtime")
def test_a_gpu_that_is_not_there(section: ContainerSection, tmp_path: Path) -> None:
    wanted = section.model_copy(update={"gpu": "rocm"})
    found = last(wanted, tmp_path)
    assert (found.name, found.outcome) == ("gpu", Outcome.FAILED)


def test_a_runtime_that_is_not_there(
    section: ContainerSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    found = last(section, tmp_path)
    assert found.name == "runtime" and "slurm.setup" in (found.remedy or "")


@pytest.mark.usefixtures("runtime")
def test_steps_with_the_same_container_are_checked_once(tmp_path: Path) -> None:
    (tmp_path / "miles.sif").touch()
    (tmp_path / "run.toml").write_text(f"""name = "r"
runs_dir = "{tmp_path}/runs"
slurm.python = "{sys.executable}"
container = {{ runtime = "apptainer", image = "miles.sif" }}
steps.a.kind = "tiny-task"
steps.b.kind = "tiny-task"
steps.c = {{ kind = "tiny-task", container.runtime = "none" }}
""")
    found = list(check_run(load_run(tmp_path / "run.toml")))
    assert {steps for steps, _ in found} == {"a, b"}
    assert {check.outcome for _, check in found} == {Outcome.OK}
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_image_is_built_where_none_is(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.def").write_text("Bootstrap: scratch\n")
    runtime.write_text('#!/bin/sh\n[ "$1" = build ] || exit 9\nfor last; do :; done\ncp "$last" image.sif\n')
    build_image(Path("image.sif"), Path("mine.def"))
    assert Path("image.sif").read_text() == "Bootstrap: scratch\n"
    with pytest.raises(RunError, match="exists"):
        build_image(Path("image.sif"), Path("mine.def"))
    with pytest.raises(RunError, match="no such file"):
        build_image(Path("other.sif"), Path("other.def"))
    runtime.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(MilesError, match="exit code 3"):
        build_image(Path("other.sif"), None)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(RunError, match="neither apptainer nor singularity"):
        build_image(Path("other.sif"), None)
