"""Three runs at once on one node of a real Slurm: two of one user, one of another, who trust each other with nothing.

Two of them find the ports taken that their job's number leads to. The secrets of the submitting shell reach the ranks,
and are to be found nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from miles.cluster.launch import Launch, read_launch
from miles.cluster.slurm.jobs import read_jobs
from miles.runs.attempts import Place, read_attempts
from miles.runs.endpoints import read_endpoints
from miles.runs.paths import RunPaths
from slurm.other_user import NAME, ONLOOKER, OtherUser, reads, why_not
from slurm.testbed import Testbed
from slurm.user import User
from tests.chaos.run import STAGE, Case

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CASE = Case("fsdp", steps=60, checkpoint_every=2, eval_every=100, hidden_size=64)
SECRETS = {"HF_TOKEN": "hf_thisisnobodyelses", "WANDB_API_KEY": "wandbthisisnobodyelses"}


@dataclass(frozen=True)
class Running:
    """One of the runs, while its stage is driven."""

    user: User
    name: str
    paths: RunPaths
    place: Place
    launch: Launch
    engine: str
    token: str

    @property
    def port(self) -> int:
        return urlsplit(self.engine).port or 0

    @property
    def scratch(self) -> Path:
        account = NAME if isinstance(self.user, OtherUser) else "root"
        return Path(f"/tmp/miles-{account}-{self.place.job}")


@pytest.fixture(scope="module")
def runs(slurm_clusters: Callable[..., Testbed]) -> Iterator[list[Running]]:
    """Three runs whose engines are up on the same node."""
    if problem := why_not():
        pytest.skip(problem)
    bed = slurm_clusters(nodes=1)
    base = Path(tempfile.mkdtemp(prefix="miles-shared-"))
    base.chmod(0o755)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, base)
        stack.callback(bed.reset)
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("USER", "LOGNAME"):
            monkeypatch.setenv(name, "root")
        for name, value in SECRETS.items():
            monkeypatch.setenv(name, value)
        (base / "other").mkdir()
        (base / "own").mkdir()
        own, other = User(base / "own", bed), OtherUser(base / "other", bed)
        started = []
        for user, name in ((own, "one"), (own, "two"), (other, "three")):
            file = (
                user.write(CASE) if not (user.directory / "files").exists() else user.directory / "files" / "run.toml"
            )
            if name in ("two", "three"):
                occupy(stack, next_job(bed) + 2)
            user.miles("submit", str(file), "--set", f'name="{name}"')
            started.append((user, name))
        running = [wait_running(user, name) for user, name in started]
        stack.callback(
            shutil.rmtree, running[-1].scratch, ignore_errors=True
        )  # root's jobs of other clusters share names
        yield running


def next_job(bed: Testbed) -> int:
    """The number that Slurm will give to the next job."""
    jobs = bed.run("squeue", "-h", "-t", "all", "-o", "%A").split()
    return max(map(int, jobs), default=0) + 1


def occupy(stack: ExitStack, job: int) -> None:
    """Listen where the engine and the ranks of a job would: on the first port of each of their searches."""
    for seed in (64 * 64 * job, 64 * 64 * job + 63):
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody listens there already
            listener.bind(("127.0.0.1", 20000 + seed * 997 % 12000))
            listener.listen()


def wait_running(user: User, name: str) -> Running:
    """Wait until the engine of a run has answered, and the first step is made."""
    user.until_step(1, name)
    paths = user.run(name)
    attempt = read_attempts(paths)[-1]
    assert attempt.step == STAGE and attempt.place is not None
    launch = read_launch(paths.allocation(attempt.place.job, 0))
    (endpoint,) = read_endpoints(paths.engines(attempt.number))
    assert isinstance(launch, Launch) and endpoint.ready
    token = paths.engine_token.read_text().strip()
    return Running(user, name, paths, attempt.place, launch, endpoint.url, token)


def answer(url: str, token: str | None) -> int:
    """Status of an engine's answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
    connection.request("GET", "/model_info", headers={} if token is None else {"Authorization": f"Bearer {token}"})
    return connection.getresponse().status


def contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    """Mode and content of every file below a directory of a run that goes on: some vanish meanwhile."""
    found = {}
    for place, _, names in os.walk(directory):
        for file in (Path(place) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                found[file] = file.stat().st_mode, file.read_bytes()
    return found


def test_they_share_a_node_and_no_port_and_make_steps(runs: list[Running]) -> None:
    assert [list(run.place.nodes) for run in runs] == [["n1"]] * 3
    assert len({port for run in runs for port in (run.port, run.launch.port)}) == 6
    for run in runs[1:]:
        seed = 64 * 64 * run.place.job
        assert run.port != 20000 + seed * 997 % 12000, "it was taken"
        assert run.launch.port != 20000 + (seed + 63) * 997 % 12000, "it was taken"


def test_an_engine_answers_its_own_run_alone(runs: list[Running]) -> None:
    for run in runs:
        assert [answer(run.engine, other.token) for other in runs] == [200 if other is run else 401 for other in runs]
        assert answer(run.engine, None) == 401
        assert answer(run.engine, "") == 401


def test_nobody_else_can_look_into_a_run(runs: list[Running]) -> None:
    for run in runs:
        for place in (run.paths.root, run.scratch, run.paths.config, run.paths.engine_token):
            assert not reads(ONLOOKER, place), place
        state = contents(run.paths.checkpoints(STAGE)) | contents(run.paths.journal(STAGE))
        assert state
        assert not [file for file, (mode, _) in state.items() if mode & 0o077], "should the directory be opened"
    assert len({run.scratch for run in runs}) == 3
    assert not reads(NAME, runs[0].paths.config)
    assert reads(NAME, runs[2].paths.config)


def test_secrets_reach_the_ranks_and_nothing_else(runs: list[Running]) -> None:
    words = [*SECRETS.values(), *(run.token for run in runs)]
    ranks = 0
    for process in psutil.process_iter():
        try:
            command, environment = " ".join(process.cmdline()), process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        assert not [word for word in words if word in command], command
        if process.pid != os.getpid():
            assert not [run for run in runs if run.token in "\0".join(environment.values())], command
        if "miles.training.worker" in command and any(str(run.paths.root) in command for run in runs):
            ranks += 1
            assert {name: environment.get(name) for name in SECRETS} == SECRETS
    assert ranks == 3
    for run in runs:
        for file, (_, content) in contents(run.paths.root).items():
            assert file == run.paths.engine_token or not [word for word in words if word.encode() in content], file
        told = "".join(run.user.bed.run("scontrol", "-dd", "show", "job", job.job) for job in read_jobs(run.paths))
        assert not [word for word in words if word in told]
