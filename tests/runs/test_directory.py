import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles.config.load import load_resolved
from miles.config.schema import ReportStep, RunConfig, TinyTaskStep
from miles.errors import RunError
from miles.runs.directory import create_run, find_run, list_runs, run_directory, set_aside
from miles.runs.paths import RunPaths


def _config(directory: Path, *, seed: int = 0, layers: int = 2, name: str = "demo") -> RunConfig:
    steps = {"prepare": TinyTaskStep(kind="tiny-task", layers=layers), "report": ReportStep(kind="report")}
    return RunConfig(name=name, seed=seed, runs_dir=str(directory / "runs"), steps=steps)


def test_new_run_has_its_config_and_a_private_token(tmp_path: Path) -> None:
    config = _config(tmp_path)
    paths = create_run(config)
    assert paths.root == tmp_path / "runs/demo"
    assert load_resolved(paths.root) == config
    assert paths.root.stat().st_mode & 0o777 == paths.secrets.stat().st_mode & 0o777 == 0o700
    assert paths.engine_token.stat().st_mode & 0o777 == 0o600
    assert len(paths.engine_token.read_text().strip()) >= 32
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]


def test_equal_config_opens_the_run_and_keeps_the_token(tmp_path: Path) -> None:
    token = create_run(_config(tmp_path)).engine_token.read_text()
    assert create_run(_config(tmp_path)).engine_token.read_text() == token


def test_other_config_is_refused_field_by_field(tmp_path: Path) -> None:
    create_run(_config(tmp_path))
    with pytest.raises(RunError) as caught:
        create_run(_config(tmp_path, seed=7, layers=3))
    assert "seed: 0 in the run, 7 now" in caught.value.message
    assert "steps.prepare.layers: 2 in the run, 3 now" in caught.value.message
    assert "experts" not in caught.value.message


def test_set_aside_keeps_every_earlier_run(tmp_path: Path) -> None:
    paths = create_run(_config(tmp_path))
    assert set_aside(paths) == tmp_path / "runs/demo.old-1"
    paths = create_run(_config(tmp_path, seed=7))
    assert set_aside(paths) == tmp_path / "runs/demo.old-2"
    assert load_resolved(tmp_path / "runs/demo.old-2").seed == 7


def test_too_little_free_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    more_than_there_is = shutil.disk_usage(tmp_path).free + 2**30
    with pytest.raises(RunError, match=r"MiB of free space; a run needs at least \d+ MiB"):
        create_run(_config(tmp_path), min_free_bytes=more_than_there_is)
    assert list((tmp_path / "runs").iterdir()) == []


def test_runs_dir_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot write") as caught:
        create_run(_config(tmp_path))
    assert "runs_dir" in str(caught.value.fix)


CREATE_ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from miles.config.schema import ReportStep, RunConfig
from miles.errors import RunError
from miles.runs.directory import create_run
config = RunConfig(name="demo", runs_dir=sys.argv[1], steps={"report": ReportStep(kind="report")})
with Path(sys.argv[1], "filler").open("wb", buffering=0) as filler:
    try:
        while filler.write(b"x" * 4096) == 4096:
            pass
    except OSError:
        pass
if sys.argv[2] == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
try:
    create_run(config, min_free_bytes=0)
except RunError as error:
    print(error.message)
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
"""


@pytest.mark.parametrize(
    ("disk", "reason"), [("full", "No space left on device"), ("read-only", "Read-only file system")]
)
def test_full_or_read_only_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, disk: str, reason: str) -> None:
    """On a real file system of 64 KiB, mounted in a namespace of the test's own."""
    mount = f'mount -t tmpfs -o size=64k none "{tmp_path}" && exec "$@"'
    namespace = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system does not let a user mount a small file system")
    command = [*namespace, sys.executable, "-c", CREATE_ON_A_SMALL_DISK, str(tmp_path), disk]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message, left = done.stdout.splitlines()
    assert "cannot write" in message
    assert reason in message
    assert left == "['filler']"


def test_run_is_found_by_name_by_path_and_as_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = create_run(_config(tmp_path, name="old")), create_run(_config(tmp_path, name="new"))
    os.utime(old.config, (time.time() - 60,) * 2)
    assert find_run("old") == old
    assert find_run("runs/old") == old
    assert find_run(None) == new
    old.metrics.write_text("")
    os.utime(new.config, (time.time() - 60,) * 2)
    assert [paths.root.name for paths in list_runs()] == ["old", "new"]


def test_unknown_run_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="there is no run under"):
        find_run(None)
    create_run(_config(tmp_path, name="quickstart"))
    with pytest.raises(RunError, match="Did you mean 'quickstart'"):
        find_run("quikstart")


def test_unfinished_draft_is_no_run(tmp_path: Path) -> None:
    paths = create_run(_config(tmp_path))
    shutil.copytree(paths.root, tmp_path / "runs/.demo.123.456.tmp")
    assert list_runs(tmp_path / "runs") == [paths]
    assert run_directory(_config(tmp_path)) == RunPaths(tmp_path / "runs/demo")
