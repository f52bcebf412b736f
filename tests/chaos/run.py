"""A small run for the proofs, and the command that starts and continues it, in processes of its own.

Owns the run file and the life of one `miles submit`. What happens to it belongs to `kills`, `damage` and `shim`, what
must be true of it afterwards to `audit`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from miles.errors import RunError
from miles.runs.attempts import read_attempts
from miles.runs.claim import current_holder
from miles.runs.files import read_json_lines
from miles.runs.identity import ProcessIdentity
from miles.runs.metrics import read_metrics
from miles.runs.paths import RunPaths

REPOSITORY = Path(__file__).parents[2]
STAGE = "grpo"
WARMUP = "warmup"
STUCK_SECONDS = 900.0
"""A submit that takes longer hangs: many times what a whole run takes on two busy cores."""

GRADER = '''"""A reward that an untrained model gets half of the time: there are gradients, and groups to drop."""


def grade(prompt, response, label, metadata):
    return float(sum(map(ord, response)) % 2)
'''

HELDOUT_PROMPTS = 8

RUN_FILE = """
name = "proof"
seed = 3
runs_dir = "{directory}/runs"

[train]
backend = "{backend}"
dtype = "float32"

[local]
threads = 1
ranks = {ranks}
engines = {engines}

[checkpoint]
every = {checkpoint_every}
asynchronous = {asynchronous}

[steps.prepare]
kind = "tiny-task"
architecture = "qwen3-moe"
hidden_size = {hidden_size}
train_prompts = 40      # the epochs change in the middle of the run
heldout_prompts = {heldout_prompts}

[steps.warmup]
kind = "sft"
model = "step:prepare/model"
data = "step:prepare/demonstrations.jsonl"

[steps.warmup.train]
steps = 8
batch_size = 16
lr = 1e-3

[steps.grpo]
kind = "rl"
model = "step:warmup/model"
data = "step:prepare/train.jsonl"
rewards = [{{ grader = "{directory}/grader.py:grade" }}]

[steps.grpo.rollout]
prompts_per_step = 4
group_size = 4
max_response_tokens = 100
{rollout}

[steps.grpo.engine]
return_routed_experts = true
hang_timeout = 10

[steps.grpo.eval]
data = "step:prepare/heldout.jsonl"
every = {eval_every}

[steps.grpo.train]
steps = {steps}
lr = 1e-3
updates_per_step = 2

[steps.grpo.journal]
keep = "all"
flush_seconds = {flush_seconds}
"""

PARTIAL = """over_sampling = 1.5
filter = "zero-variance"
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One small run: who trains, and how its batches are made."""

    backend: str = "megatron"
    partial: bool = False
    """Over-sampling with partial rollouts and the zero-variance filter, instead of whole groups of one step."""
    ranks: int = 1
    engines: int = 1
    steps: int = 12
    """Reinforcement-learning steps."""
    checkpoint_every: int = 3
    eval_every: int = 5
    flush_seconds: float = 0.5
    hidden_size: int = 64
    asynchronous: bool = True

    def __str__(self) -> str:
        extras = [f"{self.ranks} ranks"] * (self.ranks > 1) + [f"{self.engines} engines"] * (self.engines > 1)
        return " ".join([self.backend, "partial" if self.partial else "synchronous", *extras])

    def write(self, directory: Path) -> Path:
        """Write the run file and its grader into a new directory; returns the run file."""
        directory.mkdir(parents=True)
        (directory / "grader.py").write_text(GRADER)
        text = RUN_FILE.format(
            heldout_prompts=HELDOUT_PROMPTS,
            directory=directory,
            backend=self.backend,
            ranks=self.ranks,
            engines=self.engines,
            rollout=PARTIAL if self.partial else "",
            checkpoint_every=self.checkpoint_every,
            eval_every=self.eval_every,
            steps=self.steps,
            flush_seconds=self.flush_seconds,
            hidden_size=self.hidden_size,
            asynchronous=str(self.asynchronous).lower(),
        )
        file = directory / "run.toml"
        file.write_text(text)
        return file


def paths_of(file: Path) -> RunPaths:
    """The run directory of a run file that `Case.write` wrote."""
    return RunPaths(file.parent / "runs" / "proof")


class Submit:
    """One `miles submit FILE --local`, in a session of its own."""

    def __init__(self, file: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.paths = paths_of(file)
        self.started = time.time()
        self._output = file.parent / "submit.log"
        self._output_start = self._output.stat().st_size if self._output.exists() else 0
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "miles", "submit", str(file), "--local", *arguments],
                cwd=file.parent,
                env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"} | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = STUCK_SECONDS) -> int:
        """Exit code; when it takes longer than `seconds`, everything is killed and TimeoutError raised."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"the run hangs after {seconds:g} s\n{self.output()}\n{log_tails(self.paths)}") from None

    def output(self) -> str:
        """What it has printed."""
        return self._output.read_bytes()[self._output_start :].decode(errors="replace")

    def kill(self) -> None:
        """End it and every process of the run."""
        for pid in [self.process.pid, *processes(self.paths)]:
            kill(pid)
        self.process.wait()
        for pid in remains(self.paths):
            kill(pid)


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A run that nothing happened to."""

    paths: RunPaths
    seconds: float
    """Of the whole command."""


def finish(file: Path) -> Undisturbed:
    """Submit a run and wait for its end. AssertionError when it does not end well."""
    submit = Submit(file)
    code = submit.wait()
    assert code == 0, f"exit code {code}\n{submit.output()}\n{log_tails(submit.paths)}"
    return Undisturbed(submit.paths, time.time() - submit.started)


def python_path() -> str:
    """This checkout first, then wherever else this process finds packages."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def processes(paths: RunPaths) -> dict[int, str]:
    """Live processes of the run by id: the driver, and what the unfinished attempts started. Role as in the ledger."""
    found: dict[int, str] = {}
    holder = current_holder(paths)
    if holder is not None and holder.identity.pid != os.getpid():
        found[holder.identity.pid] = "driver"
    for attempt in read_attempts(paths):
        if attempt.ended is not None:
            continue
        for record in read_json_lines(paths.logs(attempt.number) / "processes.jsonl"):
            identity = ProcessIdentity(record["host"], record["pid"], record["started"])
            if identity.local and identity.alive():
                found[identity.pid] = record["role"]
    return found


def remains(paths: RunPaths) -> dict[int, str]:
    """Live processes that were started for the run in whatever way: command or environment names its directory."""
    found = {}
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
            dead = process.status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if not dead and any(str(paths.root) in word for word in words):
            found[process.pid] = " ".join(process.cmdline())
    return found


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def last_step(paths: RunPaths, stage: str = STAGE) -> int:
    """The last training step whose metrics are written; -1 before the first."""
    return max((line.step for line in read_metrics(paths) if line.stage == stage), default=-1)


def wait_for_step(submit: Submit, step: int, stage: str = STAGE) -> None:
    """Return when a stage has written the metrics of `step`, or the submit has ended."""
    deadline = time.monotonic() + STUCK_SECONDS
    while submit.running() and last_step(submit.paths, stage) < step:
        if time.monotonic() > deadline:
            submit.kill()
            raise TimeoutError(f"step {step} does not come\n{submit.output()}\n{log_tails(submit.paths)}")
        time.sleep(0.05)


def log_tails(paths: RunPaths, lines: int = 25) -> str:
    """The ends of the newest attempt's logs, for the message of a failed proof."""
    texts = []
    try:
        for log in [paths.driver_log, *sorted(paths.latest_logs.resolve().glob("*.log"))]:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
            texts.append(f"==> {log} <==\n{tail}")
    except (OSError, RunError) as error:
        texts.append(str(error))
    return "\n".join(texts)
