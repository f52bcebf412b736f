"""The catalogue of errors: every situation is brought about for real, and its panel compared with docs/errors.md's.

Whatever is wrong before the start leaves no run directory; whatever goes wrong in a step leaves the reason in the
ledger and nothing that looks finished, and the same command goes on once the cause is removed.

Through the command line, as a user would, except where a comment says which deeper entry point is used and why.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from miles.config.load import load_run
from miles.config.schema import RewardSection, TinyTaskStep
from miles.data.sample import Group, Prompt, Sample
from miles.errors import ConfigError, DataError, Interrupted, MilesError
from miles.models.tiny import build_tiny_task
from miles.rewards.grader import build_grader
from miles.runs.attempts import EndReason, read_attempts
from miles.runs.claim import Claim
from miles.runs.directory import create_run
from miles.runs.failures import FAILURE_VARIABLE, read_failure
from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths
from tests.cluster.helpers import recorded_processes, wait_for
from tests.config.conftest import make_model
from tests.config.test_messages import CASES, FILES, SYNTAX
from tests.error_catalogue.command import ENVIRONMENT, Ended, ended, flat, miles, run_all, start
from tests.error_catalogue.inputs import BAD_DATA, BAD_GRADERS, BAD_MODELS, BadInput
from tests.error_catalogue.page import PAGE, page
from tests.error_catalogue.situations import DIRECTORY, GRADING, RUNNING, Situation

SUBMIT = ("submit", "run.toml", "--local")


def assert_says(panel: str, situation: Situation, directory: Path) -> None:
    """The panel is the catalogue's: `<...>` stands for anything, DIR for the directory."""
    word = "next" if situation.error is Interrupted else "fix"
    wanted = flat(f"{situation.message} {word}: {situation.fix}")
    pattern = re.sub(r"<[^<>]+>", ".+", re.escape(wanted).replace(r"\ ", " "))
    told = panel.replace(str(directory), "DIR")
    assert re.fullmatch(pattern, told), f"\n{told}\ninstead of\n{wanted}"


def assert_ended_with(done: Ended, situation: Situation, directory: Path) -> None:
    """One panel, as in the catalogue, and the exit code of its kind."""
    assert_says(done.panel, situation, directory)
    assert done.code == situation.error.exit_code


# The run file


@dataclass(frozen=True, slots=True)
class BadFile:
    """A run file of the config room's own catalogue."""

    text: str
    words: tuple[str, ...]


CONFIG = (
    {name: BadFile(text, (message, fix)) for name, (text, message, fix) in CASES.items()}
    | {name: BadFile(text, (message,)) for name, (text, message) in SYNTAX.items()}
    | {name: BadFile(text, (message,)) for name, (text, message) in FILES.items()}
)


@pytest.fixture(scope="module")
def submitted_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Ended, Path]]:
    """`miles submit` of every bad run file, each in a directory of its own."""
    directories = {}
    for number, (name, case) in enumerate(CONFIG.items()):
        directory = directories[name] = tmp_path_factory.mktemp(f"config-{number}")
        make_model(directory / "hf")
        make_model(directory / "hf-moe", model_type="qwen3_moe", num_experts=6)
        make_model(directory / "hf-other", model_type="phi3")
        for file in ("prompts.jsonl", "prompts.csv", "grader.py"):
            (directory / file).touch()
        (directory / "run.toml").write_text(case.text)
    commands = [
        (directory, ("submit", "runn.toml" if name == "no such file" else "run.toml", "--local"))
        for name, directory in directories.items()
    ]
    return dict(zip(directories, zip(run_all(commands), directories.values(), strict=True), strict=True))


@pytest.mark.parametrize("name", CONFIG)
def test_bad_run_file(submitted_files: dict[str, tuple[Ended, Path]], name: str) -> None:
    done, directory = submitted_files[name]
    for words in CONFIG[name].words:
        assert flat(words) in done.panel
    assert done.code == ConfigError.exit_code
    assert not (directory / "runs").exists()


# Data, models, graders: all cases are steps of one run, because one submit tells the problems of all its steps

INPUTS = BAD_DATA | BAD_MODELS | BAD_GRADERS
INPUT_STEPS = {name: f"case-{number}" for number, name in enumerate(INPUTS)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model directory."""
    directory = tmp_path_factory.mktemp("tiny")
    step = TinyTaskStep(kind="tiny-task", architecture="qwen3", hidden_size=64, train_prompts=4, heldout_prompts=4)
    build_tiny_task(step, directory, seed=0)
    return directory / "model"


@pytest.fixture(scope="module")
def submitted_inputs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """`miles submit` of a run with one step for every bad input."""
    directory = tmp_path_factory.mktemp("inputs")
    steps = {INPUT_STEPS[name]: _bad_step(directory / INPUT_STEPS[name], case, model) for name, case in INPUTS.items()}
    (directory / "run.toml").write_text(tomli_w.dumps({"name": "bad", "steps": steps}))
    return miles(*SUBMIT, directory=directory), directory


def _bad_step(directory: Path, case: BadInput, model: Path) -> dict[str, Any]:
    """Write the files of a case; returns its step of the run file."""
    shutil.copytree(model, directory / "model")
    if case.model is not None:
        case.model(directory / "model")
    (directory / case.file).write_bytes(case.data if isinstance(case.data, bytes) else case.data.encode())
    (directory / "heldout.jsonl").write_text("{\n")
    (directory / "grader.py").write_text(case.grader)
    step = dict(case.step) | {"model": str(directory / "model")}
    step["data"] = step.get("data", {}) | {"path": str(directory / case.file)}
    if "eval" in step:
        step["eval"] = {"data": str(directory / step["eval"]["data"])}
    if "rewards" in step:
        file = str(directory / "grader.py")
        step["rewards"] = [row | {"grader": row["grader"].replace("grader.py", file)} for row in step["rewards"]]
    return step


@pytest.mark.parametrize("name", INPUTS)
def test_bad_input_is_told_before_anything_starts(submitted_inputs: tuple[Ended, Path], name: str) -> None:
    done, directory = submitted_inputs
    problems = re.split(r"step '(case-\d+)': ", done.panel)
    told = dict(zip(problems[1::2], problems[2::2], strict=True))
    step, case = INPUT_STEPS[name], INPUTS[name]
    assert_says(told[step].strip(), Situation(DataError, case.message, case.fix), directory / step)
    assert done.code == DataError.exit_code
    assert not (directory / "runs").exists()
    assert len(told) == len(INPUTS)


# The run directory

PREPARE = 'name = "demo"\n[steps.prepare]\nkind = "tiny-task"\n'


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system in memory, with the given options of `mount`."""
    mounted = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small disk is not permitted here")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_run_directory_that_does_not_allow_it(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    (tmp_path / "run.toml").write_text(PREPARE)
    (tmp_path / "file").touch()
    create_run(load_run(tmp_path / "run.toml", [f'runs_dir="{tmp_path}/runs"']))
    for name in ("held", "torn", "foreign"):
        create_run(load_run(tmp_path / "run.toml", [f'runs_dir="{tmp_path}/runs"', f'name="{name}"']))
    (tmp_path / "runs/torn/attempts.jsonl").write_text("not JSON\n")
    (tmp_path / "runs/foreign/run.toml").write_text('name = "foreign"\n')
    full, read_only = small_disk("size=1m"), small_disk("ro")
    commands = {
        "There is no Slurm where the run is submitted": ("submit", "run.toml"),
        "`miles init` would overwrite a file": ("init", "run.toml"),
        "The directory for runs cannot be written": (*SUBMIT, "--set", f'runs_dir="{read_only}"'),
        "The directory for runs is a file": (*SUBMIT, "--set", f'runs_dir="{tmp_path}/file"'),
        "The disk is full at the start": (*SUBMIT, "--set", f'runs_dir="{full}"'),
        "A live process drives the run": (*SUBMIT, "--set", 'name="held"', "--set", f'runs_dir="{tmp_path}/runs"'),
        "The run file has changed since the run began": (
            *(*SUBMIT, "--set", f'runs_dir="{tmp_path}/runs"'),
            *("--set", "seed=7", "--set", "steps.prepare.layers=3"),
        ),
        "The run's resolved run.toml is damaged": ("status", "foreign"),
        "A line of the run's ledger is damaged": ("status", "torn"),
        "There is no such run": ("status", "demi"),
        "There is nothing to stop": ("stop", "demo"),
        "There is nothing to save": ("save", "demo"),
        "There is nothing to go back to": ("resume", "demo", "--from", "3"),
        "There is nothing to export": ("export", "demo", "out"),
        "The stage to begin again is none": ("resume", "demo", "--restart", "prepare"),
        "The step to go back to is none": ("export", "demo", "out", "--from", "last"),
        "A run is forked into one that exists": ("fork", "demo", "held"),
    }
    assert commands.keys() == DIRECTORY.keys()
    files = sorted(tmp_path.rglob("*"))
    with Claim.acquire(RunPaths(tmp_path / "runs/held")):
        results = run_all([(tmp_path, arguments) for arguments in commands.values()])
    for name, done in zip(commands, results, strict=True):
        assert_ended_with(done, DIRECTORY[name], tmp_path)
    claim = tmp_path / "runs/held/claims/000001.json"
    assert sorted(path for path in tmp_path.rglob("*") if path != claim) == files


# Steps that fail


GRADER = """
import time
from pathlib import Path

def grade(prompt, response, label, metadata):
    Path(__file__).with_name("called").touch()
    match Path(__file__).with_name("mode").read_text():
        case "wait":
            time.sleep(600)
        case "raise":
            raise ValueError("no digits in the response")
    return 1.0
"""


def kill(paths: RunPaths, role: str) -> None:
    """SIGKILL to the newest recorded process of a role."""
    os.kill([record["pid"] for record in recorded_processes(paths) if record["role"] == role][-1], signal.SIGKILL)


def assert_recorded(paths: RunPaths, step: str, reason: EndReason, done: Ended) -> None:
    """The last attempt ended for that reason and with that exit code, and nothing looks finished."""
    attempt = read_attempts(paths)[-1]
    assert (attempt.step, attempt.reason, attempt.exit_code) == (step, reason, done.code)
    assert flat(attempt.detail).split(" end of ")[0] in done.panel
    assert not paths.done(step).exists()
    assert not [path for path in paths.step(step).rglob("*") if path.name in ("config.json", "results.json")]


@pytest.mark.timeout(900)  # four starts of engines and ranks, on a machine that may be busy
def test_step_with_engines_fails_and_goes_on_when_the_cause_is_removed(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    (tmp_path / "data.jsonl").write_text('{"prompt": "sort 21"}\n')
    (tmp_path / "grader.py").write_text(GRADER)
    (tmp_path / "run.toml").write_text(f"""
name = "demo"
runs_dir = "{tmp_path}/runs"
model = "own"
[steps.check]
kind = "eval"
eval.data = "data.jsonl"
rewards = [{{grader = "grader.py:grade", timeout = 600}}]
rollout.max_response_tokens = 4
engine.max_restarts = 0
local.threads = 1
""")
    paths = RunPaths(tmp_path / "runs/demo")

    config = (own / "config.json").read_text()
    deeper = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (own / "config.json").write_text(json.dumps(json.loads(config) | deeper))
    done = miles(*SUBMIT, directory=tmp_path)
    assert_ended_with(done, RUNNING["An engine cannot load the model"], tmp_path)
    assert_recorded(paths, "check", EndReason.ENGINE_START, done)
    (own / "config.json").write_text(config)

    (tmp_path / "mode").write_text("wait")
    running = start(*SUBMIT, directory=tmp_path)
    wait_for((tmp_path / "called").exists, "the grader to be called", seconds=120)
    kill(paths, "engine")
    done = ended(running)
    assert_ended_with(done, RUNNING["An engine is killed, and engine.max_restarts = 0"], tmp_path)
    assert_recorded(paths, "check", EndReason.ENGINE_CRASH, done)

    (tmp_path / "mode").write_text("raise")
    done = miles(*SUBMIT, directory=tmp_path)
    assert_ended_with(done, RUNNING["A grader raises"], tmp_path)
    assert_recorded(paths, "check", EndReason.FAILED, done)

    (tmp_path / "mode").write_text("score")
    done = miles(*SUBMIT, directory=tmp_path)
    assert done.code == 0, done.errors
    assert (paths.step("check") / "results.json").exists()


@pytest.mark.timeout(900)
def test_supervised_step_fails_and_goes_on_when_the_cause_is_removed(
    model: Path, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=300m")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "sort 21", "response": "12"}\n')
    (tmp_path / "run.toml").write_text(f"""
name = "demo"
runs_dir = "{disk}/runs"
model = "{model}"
data = "pairs.jsonl"
[steps.warmup]
kind = "sft"
train = {{backend = "fsdp", dtype = "float32", steps = 60, batch_size = 64}}
checkpoint.every = 100
local.threads = 1
""")
    paths = RunPaths(disk / "runs/demo")

    def interrupted(act: Callable[[subprocess.Popen[str]], object]) -> Ended:
        """Submit, and act when the first steps are done."""
        began = time.time()
        running = start(*SUBMIT, directory=tmp_path)
        wait_for(lambda: any(line.time > began for line in read_metrics(paths)), "metrics", seconds=240)
        act(running)
        return ended(running)

    done = interrupted(lambda running: kill(paths, "trainer"))
    assert_ended_with(done, RUNNING["A trainer rank is killed"], tmp_path)
    assert_recorded(paths, "warmup", EndReason.TRAINER_CRASH, done)

    def fill(running: subprocess.Popen[str]) -> None:
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**20))

    done = interrupted(fill)
    assert_ended_with(done, RUNNING["The disk becomes full"], tmp_path)
    assert not paths.done("warmup").exists()
    (disk / "filler").unlink()

    done = interrupted(lambda running: running.send_signal(signal.SIGINT))
    assert_ended_with(done, RUNNING["The run is stopped"], tmp_path)
    assert_recorded(paths, "warmup", EndReason.STOPPED, done)

    pairs = tmp_path / "pairs.jsonl"
    before = pairs.stat()
    pairs.touch()
    done = miles(*SUBMIT, directory=tmp_path)
    assert_ended_with(done, RUNNING["A file that the trained steps were made with has changed"], tmp_path)
    os.utime(pairs, ns=(before.st_atime_ns, before.st_mtime_ns))

    done = miles(*SUBMIT, directory=tmp_path)
    assert done.code == 0, done.errors
    assert (paths.step("warmup") / "model/config.json").exists()


# Deeper entry points: the supervisor looks for free ports, so that one is taken only when somebody is faster


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("An engine's port is taken", ["miles.engines.serve", "--index", "0", "--port", "{port}"]),
        ("The trainer's port is taken", ["miles.training.worker"]),
    ],
)
def test_port_that_is_taken(model: Path, tmp_path: Path, name: str, arguments: list[str]) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "sort 21", "label": "12"}\n')
    text = f'name = "demo"\nrollout.max_response_tokens = 8\nmodel = "{model}"\ndata = "data.jsonl"\n'
    (tmp_path / "run.toml").write_text(text)
    paths = create_run(load_run(tmp_path / "run.toml", [f'runs_dir="{tmp_path}/runs"']))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        environment = ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(port), FAILURE_VARIABLE: str(tmp_path / "failure.json")}
        where = ["--run-dir", str(paths.root), "--step", "train"]
        command = [sys.executable, "-m", *(argument.format(port=port) for argument in arguments), *where]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    failure = read_failure(tmp_path / "failure.json")
    assert failure is not None, done.stderr
    assert_says(flat(f"{failure.message} fix: {failure.fix}"), RUNNING[name], tmp_path)
    assert done.returncode == RUNNING[name].error.exit_code == failure.exit_code
    assert not paths.steps.joinpath("train").exists()


# What graders may do is tried on the grader that a step builds: a run takes long to get there


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("A grader returns something that is no number", 'return "good"'),
        ("A grader returns a number that is not finite", 'return float("nan")'),
        ("A grader returns a dict without `reward`", 'return {"score": 1.0}'),
        ("A grader takes too long", "import time; time.sleep(60)"),
        ("A grader ends its process", "import os; os._exit(3)"),
    ],
)
def test_grader_that_misbehaves(tmp_path: Path, name: str, body: str) -> None:
    file = tmp_path / "grader.py"
    file.write_text(f"def grade(prompt, response, label, metadata):\n    {body}\n")
    prompt = Prompt("p7", [1], "sort 21", "12", {})
    grader = build_grader([RewardSection(grader=f"{file}:grade", timeout=0.5)])
    try:
        with pytest.raises(MilesError) as caught:
            asyncio.run(grader.grade([Group(prompt, [Sample(prompt, 0, seed=0, text="12")])]))
    finally:
        grader.close()
    assert_says(flat(f"{caught.value.message} fix: {caught.value.fix}"), GRADING[name], tmp_path)
    assert type(caught.value) is GRADING[name].error


def test_every_entry_is_brought_about() -> None:
    text = Path(__file__).read_text()
    assert [name for name in (RUNNING | GRADING) if f'"{name}"' not in text] == []


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.error_catalogue.page > docs/errors.md"
