"""A real Apptainer: an image built from a definition file, and processes in it, by this user and by an ordinary one.

The image is empty but for directories; the programs in it are this machine's, whose /usr is bound. `APPTAINER` on PATH,
or in `MILES_TEST_APPTAINER/usr/bin`; tests/slurm/get_apptainer.sh fetches one.
"""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles.cluster.containers import container_command
from miles.config.cluster import ContainerSection
from miles.runs.attempts import EndReason
from slurm.other_user import NAME, OtherUser, why_not
from slurm.testbed import Testbed, wait_text
from slurm.user import User
from tests.chaos.run import STAGE, Case

REPOSITORY = Path(__file__).parents[2]
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")
DEFINITION = """Bootstrap: scratch

%setup
    cd "$APPTAINER_ROOTFS"
    mkdir -p usr etc tmp var/tmp dev proc sys root home
    ln -s usr/bin bin
    ln -s usr/sbin sbin
    ln -s usr/lib lib
    ln -s usr/lib64 lib64
    touch etc/passwd etc/group etc/hosts etc/resolv.conf etc/localtime
"""
NOBODY = 65534
SHOW = """
import json, os, sys
def writable(path):
    try:
        open(os.path.join(path, "written"), "w").close()
        return True
    except OSError:
        return False
print(json.dumps({
    "environment": dict(os.environ), "cwd": os.getcwd(), "uid": os.getuid(), "home": os.path.expanduser("~"),
    "writable": [path for path in (os.getcwd(), os.environ["TMPDIR"], "/opt", "/etc", "/usr") if writable(path)],
}))
"""
LISTEN = """
import os, signal, sys, time
def heard(number, frame):
    print("heard", signal.Signals(number).name, os.environ.get("SLURMD_NODENAME", "-"), flush=True)
for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
    signal.signal(number, heard)
print("up", os.environ.get("SLURM_PROCID", "-"), os.environ.get("CUDA_VISIBLE_DEVICES", "-"), flush=True)
end = time.monotonic() + 60
while time.monotonic() < end and not os.path.exists(sys.argv[1]):
    time.sleep(0.05)
sys.exit(75)
"""


@pytest.fixture(scope="module")
def apptainer() -> Iterator[str]:
    """A directory with apptainer; the environment names it, and what a root with few rights needs."""
    given = os.environ.get("MILES_TEST_APPTAINER")
    path = f"{given}/usr/bin:{os.environ['PATH']}" if given else os.environ["PATH"]
    program = shutil.which("apptainer", path=path)
    if program is None:
        missing = "no apptainer: tests/slurm/get_apptainer.sh DIR, and MILES_TEST_APPTAINER=DIR in the environment"
        warnings.warn(f"the tests in a real container do not run. {missing}", stacklevel=1)
        pytest.skip(missing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        patch.setenv("APPTAINER_USERNS", "1")
        yield program


@pytest.fixture(scope="module")
def image(apptainer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image, built by our own command, where any user may read it."""
    directory = tmp_path_factory.mktemp("image")
    (directory / "small.def").write_text(DEFINITION)
    built = directory / "small.sif"
    miles("container", "build", "--def", str(directory / "small.def"), str(built))
    anybody_may_pass(directory)
    return built


def anybody_may_pass(directory: Path) -> None:
    """Into a directory that pytest made, through its two parents, which are pytest's too."""
    for place in (directory, *directory.parents[:2]):
        place.chmod(0o755)


def miles(*arguments: str, code: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "miles", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def section(image: Path, **keys: object) -> ContainerSection:
    return ContainerSection.model_validate(
        {"runtime": "apptainer", "image": str(image), "binds": ["/usr:/usr:ro"]} | keys
    )


def own_programs() -> list[str]:
    """Binds that bring this Python, and all that it has installed, into the empty image."""
    prefixes = {sys.prefix, sys.base_prefix} - {"/usr"}
    return ["/usr:/usr:ro", *(f"{prefix}:{prefix}:ro" for prefix in sorted(prefixes))]


@pytest.fixture(params=["this", "nobody"])
def user(request: pytest.FixtureRequest) -> int:
    """Number of the user who starts the container."""
    if request.param == "this":
        return os.getuid()
    if os.getuid() != 0:
        pytest.skip("only root can become another user; this one is ordinary already")
    return NOBODY


@pytest.fixture
def run_dir(tmp_path: Path, user: int) -> Path:
    """A run directory of the user's; every directory above it can be passed."""
    made = tmp_path / "run"
    made.mkdir()
    os.chown(made, user, -1)
    anybody_may_pass(tmp_path)
    return made


def test_inside_are_the_run_directory_and_what_is_allowed(image: Path, run_dir: Path, user: int) -> None:
    secret = "a'b\"c$HOME`id`\\n\nSLURM_FAKE=1"
    command = container_command(section(image), run_dir=run_dir, environment=["HF_TOKEN"], scratch=str(run_dir))
    environment = {name: os.environ[name] for name in ("PATH", "APPTAINER_USERNS")}
    environment |= {"HF_TOKEN": secret, "SLURM_PROCID": "1", "HOME": "/home/somebody", "WANDB_API_KEY": "no", "X": "no"}
    done = subprocess.run(
        [*command, PYTHON, "-c", SHOW], env=environment, cwd="/", user=user, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    inside = json.loads(done.stdout)
    scratch = f"{run_dir}/miles-{user}"
    assert inside["environment"]["HF_TOKEN"] == secret
    assert inside["environment"]["SLURM_PROCID"] == "1"
    assert not {"WANDB_API_KEY", "X", "SLURM_FAKE"} & set(inside["environment"])
    assert (inside["uid"], inside["cwd"], inside["home"]) == (user, str(run_dir), scratch)
    assert inside["writable"] == [str(run_dir), scratch]
    assert (run_dir / "written").exists()


def test_signals_reach_the_process_and_its_exit_code_comes_out(image: Path, run_dir: Path, user: int) -> None:
    """Slurm signals the whole group and Apptainer passes on, so that each may come more than once."""
    command = container_command(section(image), run_dir=run_dir, scratch=str(run_dir))
    output = run_dir.parent / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [*command, PYTHON, "-c", LISTEN, str(run_dir / "end")],
            user=user,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        wait_text(output, "up")
        for number in (signal.SIGUSR2, signal.SIGCONT, signal.SIGTERM):
            os.killpg(process.pid, number)
            wait_text(output, f"heard {number.name}")
        (run_dir / "end").touch()
        assert process.wait(30) == 75
    assert output.read_text().count("heard SIGUSR2") >= 1


def test_check_answers_every_question(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(f"""name = 'r'
runs_dir = '{tmp_path}/runs'
steps.t.kind = 'tiny-task'
slurm.python = '{sys.executable}'
container = {{ runtime = 'apptainer', image = '{image}', binds = {own_programs()} }}
""")
    found = json.loads(miles("container", "check", str(run_file), "--json"))
    assert {each["outcome"] for each in found} == {"ok"}, found
    names = ["runtime", "image", "start", "python", "miles", "run directory", "scratch", "inputs"]
    assert [each["name"] for each in found] == names

    found = json.loads(miles("container", "check", str(run_file), "--json", "--set", 'slurm.python="python9"', code=1))
    assert found[-1]["name"] == "python" and "slurm.python" in found[-1]["remedy"]
    found = json.loads(miles("container", "check", str(run_file), "--json", "--set", 'container.gpu="nvidia"', code=1))
    assert found[-1]["name"] == "gpu" and "srun" in found[-1]["remedy"]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    found = json.loads(miles("container", "check", str(run_file), "--json", code=1))
    assert [each["outcome"] for each in found] == ["failed"] and "PATH" in found[0]["message"]


def test_two_nodes_of_a_job_hear_what_srun_forwards(
    apptainer: str, image: Path, slurm: Testbed, tmp_path: Path
) -> None:
    """The way of a preemption: the batch shell hears it and passes USR2 on to srun."""
    command = container_command(section(image), run_dir=tmp_path)
    words = shlex.join([*command, str(PYTHON), "-c", LISTEN, str(tmp_path / "end")])
    script = f"""#!/bin/bash
export APPTAINER_USERNS=1 PATH={Path(apptainer).parent}:$PATH
srun --ntasks-per-node=1 {words} &
srun=$!
trap 'kill -USR2 $srun' USR1
wait $srun
while [ -d /proc/$srun ]; do wait $srun; done
wait $srun
"""
    job = slurm.sbatch(script, "-N2", "--gpus-per-node=2", "-o", tmp_path / "out")
    out = tmp_path / "out"
    assert {"up 0 0,1", "up 1 0,1"} <= set(wait_text(out, "up 0") and wait_text(out, "up 1").splitlines())
    slurm.run("scancel", "--batch", "--signal=USR1", str(job))
    wait_text(out, "heard SIGUSR2 n1")
    wait_text(out, "heard SIGUSR2 n2")
    (tmp_path / "end").touch()
    ended = slurm.wait_state(job, "COMPLETED", "FAILED")
    assert ended["ExitCode"] == "75:0", out.read_text()


@pytest.fixture(params=["this", "nobody"])
def person(request: pytest.FixtureRequest, slurm: Testbed, tmp_path: Path) -> User:
    """Who submits, in a directory of their own."""
    directory = tmp_path / "user"
    directory.mkdir()
    if request.param == "this":
        return User(directory, slurm)
    if problem := why_not():
        pytest.skip(problem)
    anybody_may_pass(tmp_path)
    return OtherUser(directory, slurm)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_of_two_nodes_in_containers_is_preempted_and_ends_with_the_same_bits(
    apptainer: str, image: Path, slurm: Testbed, person: User
) -> None:
    file = person.write(Case(steps=5, checkpoint_every=2, eval_every=5, hidden_size=64))
    ordinary = isinstance(person, OtherUser)
    (person.directory / "contained.toml").write_text(f"""extends = "{file}"
slurm.python = "{person.python if ordinary else sys.executable}"
slurm.setup = ["export APPTAINER_USERNS=1 PATH={Path(apptainer).parent}:$PATH"]
steps.{STAGE}.slurm.nodes = 2

[container]
runtime = "apptainer"
image = "{image}"
binds = {["/usr:/usr:ro", *person.python_binds] if ordinary else own_programs()}
env = ["LD_LIBRARY_PATH"]
""")
    person.miles("submit", "contained.toml")
    person.until_state("done")

    preempted = person.fork("preempted")
    person.miles("resume", "preempted")
    person.until_step(2, "preempted")
    slurm.preempt(person.job("preempted"))
    person.until_state("done", "preempted")

    assert person.reasons("preempted") == [EndReason.PREEMPTED, EndReason.FINISHED]
    assert person.settled(preempted) == []
    owners = {path.owner() for path in preempted.root.rglob("*")}
    assert owners == {NAME if ordinary else pwd.getpwuid(os.getuid()).pw_name}
