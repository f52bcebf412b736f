"""The words before a process in a container; the script in them is run with stand-ins for the runtimes."""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

import miles
from miles.cluster.containers import PROGRAMS, Bind, bound, container_command, source_tree
from miles.config.cluster import ContainerSection
from miles.errors import ConfigError

RUNTIMES = ("apptainer", "singularity", "enroot", "charliecloud")
STAND_IN = """#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done >words
env -0 >environment
"""


def section(runtime: str = "apptainer", **keys: object) -> ContainerSection:
    return ContainerSection.model_validate({"runtime": runtime, "image": "/images/miles.sif"} | keys)


def started(tmp_path: Path, command: tuple[str, ...], **environment: str) -> tuple[list[str], dict[str, str]]:
    """The words and the environment with which the runtime is started on the node."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name in PROGRAMS.values():
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "TMPDIR": str(tmp_path)} | environment
    subprocess.run([*command, "python3", "-m", "x"], env=environment, cwd=tmp_path, check=True)
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    pairs = (tmp_path / "environment").read_text().split("\0")[:-1]
    return words, dict(pair.split("=", 1) for pair in pairs)


def test_no_container_is_no_words(tmp_path: Path) -> None:
    assert container_command(ContainerSection(), run_dir=tmp_path, gpus=True) == ()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_process_comes_last_and_the_image_before_it(tmp_path: Path, runtime: str) -> None:
    words, _ = started(tmp_path, container_command(section(runtime), run_dir=tmp_path))
    inside = words[words.index("/images/miles.sif") + 1 :]
    assert inside[inside.index("env") :][:2] == ["env", f"--chdir={tmp_path}"]
    assert inside[-3:] == ["python3", "-m", "x"]
    assert any(str(tmp_path) in word for word in words[: words.index("/images/miles.sif")])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_values_of_the_environment_are_never_words(tmp_path: Path, runtime: str) -> None:
    command = container_command(section(runtime, env=["WANDB_API_KEY"]), run_dir=tmp_path, environment=["HF_TOKEN"])
    words, _ = started(tmp_path, command, HF_TOKEN="hf-secret", WANDB_API_KEY="wandb-secret", SLURM_PROCID="3")
    assert "secret" not in "\0".join((*command, *words))


def test_apptainer_passes_what_is_allowed_and_nothing_else(tmp_path: Path) -> None:
    hostile = "a'b\"c$(touch hit)`touch hit`\nSLURM_FAKE=1"
    passed = {"SLURM_PROCID": "3", "MILES_CLAIM": "2", "CUDA_VISIBLE_DEVICES": "0,1", "HF_TOKEN": hostile}
    other = {"LD_PRELOAD_OF_OURS": "x", "PYTHONPATH": "/y", "XSLURM_A": "1", "HF_TOKEN_2": "z", "SLURM_JWT": "key"}
    command = container_command(section(), run_dir=tmp_path, environment=["HF_TOKEN"])
    words, environment = started(tmp_path, command, **passed, **other)
    inside = {name.removeprefix("APPTAINERENV_"): value for name, value in environment.items() if "ENV_" in name}
    scratch = f"{tmp_path}/miles-{os.getuid()}"
    assert inside == passed | {"TMPDIR": scratch, "MILES_SCRATCH": scratch}
    assert "--cleanenv" in words
    assert environment["APPTAINER_NO_EVAL"] == "1"
    assert not (tmp_path / "hit").exists()


def test_singularity_reads_variables_of_its_own_name(tmp_path: Path) -> None:
    words, environment = started(
        tmp_path, container_command(section("singularity"), run_dir=tmp_path), SLURM_NODEID="1"
    )
    assert environment["SINGULARITYENV_SLURM_NODEID"] == "1"
    assert words[0] == "exec"


def test_enroot_gets_names(tmp_path: Path) -> None:
    words, _ = started(tmp_path, container_command(section("enroot"), run_dir=tmp_path), SLURM_NODEID="1", OTHER="2")
    named = [word for before, word in pairwise(words) if before == "--env"]
    assert "SLURM_NODEID" in named and "OTHER" not in named
    assert f"{tmp_path}:{tmp_path}:none:x-create=auto,rbind" in words


@pytest.mark.parametrize("runtime", ["apptainer", "enroot", "charliecloud"])
def test_home_is_bound_only_on_request(tmp_path: Path, runtime: str) -> None:
    without = " ".join(container_command(section(runtime), run_dir=tmp_path))
    with_home = " ".join(container_command(section(runtime, home=True), run_dir=tmp_path))
    marks = {
        "apptainer": ("--no-mount home", "exec --cleanenv  --bind"),
        "enroot": ("ENROOT_MOUNT_HOME=n", "ENROOT_MOUNT_HOME=y"),
        "charliecloud": ("HOME=$inside", "--home"),
    }
    assert marks[runtime][0] in without and marks[runtime][0] not in with_home
    assert marks[runtime][1] in with_home and marks[runtime][1] not in without


@pytest.mark.parametrize(
    ("gpu", "gpus", "flag"),
    [
        ("auto", True, "--nv"),
        ("auto", False, None),
        ("nvidia", False, "--nv"),
        ("rocm", True, "--rocm"),
        ("none", True, None),
    ],
)
def test_the_driver_of_the_gpus(tmp_path: Path, gpu: str, gpus: bool, flag: str | None) -> None:
    command = container_command(section(gpu=gpu), run_dir=tmp_path, gpus=gpus)
    assert [word for word in command if word in ("--nv", "--rocm")] == ([flag] if flag else [])


def test_scratch_is_private_and_refused_when_it_is_a_link(tmp_path: Path) -> None:
    command = container_command(section(), run_dir=tmp_path)
    started(tmp_path, command)
    scratch = tmp_path / f"miles-{os.getuid()}"
    assert scratch.stat().st_mode & 0o777 == 0o700
    scratch.rmdir()
    (tmp_path / "elsewhere").mkdir()
    scratch.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        started(tmp_path, command)
    assert caught.value.returncode == 73


def test_a_runtime_that_the_job_does_not_find_is_named(tmp_path: Path) -> None:
    command = container_command(section(), run_dir=tmp_path)
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    done = subprocess.run([*command, "true"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "apptainer is not on the PATH of the job" in done.stderr and '["module load ...' in done.stderr


def test_scratch_is_what_the_node_says(tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    _, environment = started(tmp_path, container_command(section(), run_dir=tmp_path), MILES_SCRATCH=str(local))
    assert environment["APPTAINERENV_TMPDIR"] == str(local)
    other = container_command(section(), run_dir=tmp_path, scratch=f"{tmp_path}/a b;c")
    _, environment = started(tmp_path, other, TMPDIR="/not/there")
    assert environment["APPTAINERENV_TMPDIR"] == f"{tmp_path}/a b;c/miles-{os.getuid()}"


def test_parents_hold_their_children_and_each_is_bound_once(tmp_path: Path) -> None:
    for name in ("a/b", "c"):
        (tmp_path / name).mkdir(parents=True)
    a, b, c = tmp_path / "a", tmp_path / "a" / "b", tmp_path / "c"
    assert bound([b, a, c, b, tmp_path / "a" / ".." / "c"], []) == (Bind(a, a), Bind(c, c))


def test_links_come_with_what_they_point_to(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub, whose snapshots are links into `blobs`."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "3f").touch()
    (snapshot / "config.json").symlink_to("../../blobs/3f")
    (snapshot / "gone").symlink_to("../../blobs/not-there")
    link = tmp_path / "model"
    link.symlink_to(snapshot)
    assert {bind.source for bind in bound([link], [])} == {link, snapshot, blobs}


def test_a_bind_of_the_user_wins(tmp_path: Path) -> None:
    other = Path("/fast/copy")
    assert bound([tmp_path], [f"{other}:{tmp_path}:ro", "/data"]) == (
        Bind(other, tmp_path, read_only=True),
        Bind(Path("/data"), Path("/data")),
    )
    command = container_command(section(binds=["/data:/corpora:ro"]), run_dir=tmp_path)
    assert command[command.index("/data:/corpora:ro") - 1] == "--bind"


def test_this_checkout_runs_inside_too(tmp_path: Path) -> None:
    root = Path(miles.__file__).parents[1]
    assert source_tree() == root
    command = container_command(section(), run_dir=tmp_path)
    assert f"PYTHONPATH={root}" in command and f"{root}:{root}" in command


@pytest.mark.parametrize("text", ["data", "/a:b", "/a:/b:rx", "/a:/b:ro:x", ""])
def test_a_bind_of_the_user_must_be_readable(text: str) -> None:
    with pytest.raises(ConfigError, match=r"container\.binds"):
        bound([], [text])


@pytest.mark.parametrize("path", ["/a:b", "/a,b", "/a\nb", "/a\\b", "/usr", "/"])
def test_a_path_that_the_runtime_would_misread_is_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        container_command(section(), run_dir=Path(path))


@pytest.mark.parametrize("name", ["A=B", "A B", "A;touch hit", "*", "A*B", "$(x)", "A\nB", ""])
def test_only_names_of_variables_are_taken(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        container_command(section(), run_dir=tmp_path, environment=[name])
    with pytest.raises(ConfigError):
        container_command(section(env=[name]), run_dir=tmp_path)


def test_an_image_is_never_an_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dash"):
        container_command(section(image="--bind=/etc"), run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"needs container\.image"):
        container_command(section(image=None), run_dir=tmp_path)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_script_is_clean(tmp_path: Path, runtime: str) -> None:
    script = container_command(section(runtime), run_dir=tmp_path)[2]
    subprocess.run(["dash", "-n", "-c", script], check=True)
    words = "--exclude=SC2013"  # the names that awk prints are words
    subprocess.run(["shellcheck", "--shell=sh", words, "-"], input=script, text=True, check=True)
