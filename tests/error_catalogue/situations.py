"""What can be wrong with a run directory, and what can happen to a run, each with the panel that it leads to.

In a message, DIR is the user's directory and `<...>` what differs from case to case. docs/errors.md is made of these
entries; tests/test_error_catalogue.py brings each about.
"""

from __future__ import annotations

from dataclasses import dataclass

from miles.errors import ConfigError, DataError, EngineError, Interrupted, MilesError, RunError, TrainerError


@dataclass(frozen=True, slots=True)
class Situation:
    """What is said, and by which kind of error, which decides the exit code."""

    error: type[MilesError]
    message: str
    fix: str


DIRECTORY = {
    "There is no Slurm where the run is submitted": Situation(
        ConfigError,
        "Slurm is not on this machine: there is no sbatch in PATH",
        "use a login node of the cluster; `miles submit run.toml --local` runs it on this machine",
    ),
    "`miles init` would overwrite a file": Situation(
        RunError, "run.toml exists", "name another file: `miles init FILE`"
    ),
    "The directory for runs cannot be written": Situation(
        RunError,
        "cannot write DIR/<disk>: Read-only file system",
        "make it writable, or use another directory (runs_dir)",
    ),
    "The directory for runs is a file": Situation(
        RunError,
        "cannot write DIR/file: File exists",
        "a file stands where a directory belongs: move it, or use another directory (runs_dir)",
    ),
    "The disk is full at the start": Situation(
        RunError,
        "DIR/<disk> has 1 MiB of free space; a run needs at least 256 MiB",
        "free some space there, or set runs_dir to a directory on another disk",
    ),
    "A live process drives the run": Situation(
        RunError,
        "run 'held' is in use by process <id> on <host>, since <time>",
        "`miles watch held` shows it, `miles stop held` ends it",
    ),
    "The run file has changed since the run began": Situation(
        RunError,
        "run 'demo' exists with another config (DIR/runs/demo): seed: 0 in the run, 7 now "
        "steps.prepare.layers: 2 in the run, 3 now",
        "undo the change to continue the run, `miles fork demo NEW --set KEY=VALUE` to go on from its state with the "
        "change, `--set name=NEW` to start another one, or `--fresh` to set the old one aside",
    ),
    "The run's resolved run.toml is damaged": Situation(
        RunError,
        "DIR/runs/foreign/run.toml: not a resolved run of this version of Miles: steps: Field required",
        "submit the run file anew",
    ),
    "A line of the run's ledger is damaged": Situation(
        RunError,
        "DIR/runs/torn/attempts.jsonl, line 1: not JSON (<reason>)",
        "remove that line: nothing of Miles wrote it",
    ),
    "There is no such run": Situation(
        RunError,
        "there is no run 'demi': neither ./demi nor runs/demi holds a run.toml. Did you mean 'demo'?",
        "`miles runs` lists the runs of this directory",
    ),
    "There is nothing to stop": Situation(
        RunError, "run 'demo' is not running", "`miles status demo` shows where it stands"
    ),
    "There is nothing to save": Situation(
        RunError,
        "run 'demo' is not running: there is nothing to save that is not on disk",
        "`miles checkpoints demo` shows what it has",
    ),
    "There is nothing to go back to": Situation(
        RunError,
        "run 'demo' has no trained step to go on from",
        "`miles resume demo` without --from starts what is to do",
    ),
    "There is nothing to export": Situation(
        RunError,
        "run 'demo' has no checkpoints",
        "`miles save demo` makes one while a step of kind sft or rl runs",
    ),
    "The stage to begin again is none": Situation(
        RunError, "run 'demo' has no stage 'prepare'.", "it has no step of kind sft or rl"
    ),
    "The step to go back to is none": Situation(
        ConfigError, "--from last: neither a step nor 'start'", "for example --from step-000040"
    ),
    "A run is forked into one that exists": Situation(
        RunError, "there is a run 'held' already: DIR/runs/held", "give the new run another name"
    ),
}
"""Nothing is started or written."""

RUNNING = {
    "An engine cannot load the model": Situation(
        EngineError,
        "DIR/own has no weight 'model.layers.2.input_layernorm.weight', which its config.json calls for"
        " (11 are missing)",
        "the directory is incomplete or its config.json belongs to another model",
    ),
    "An engine is killed, and engine.max_restarts = 0": Situation(
        EngineError,
        "engine 0 (process <id>) was killed by SIGKILL (the system does that when memory runs out) <end of its log>",
        "`miles logs demo --role engine` shows the whole log; `miles resume <run directory>` continues the run",
    ),
    "A grader raises": Situation(
        DataError,
        "grader 'DIR/grader.py:grade' raised ValueError: no digits in the response (at "
        "DIR/grader.py:11), for response 0 to prompt '<id>'",
        'correct the grader or raise its timeout; on_error = "zero" scores such responses 0',
    ),
    "A trainer rank is killed": Situation(
        TrainerError,
        "trainer 0 (process <id>) was killed by SIGKILL (the system does that when memory runs out) <end of its log>",
        "`miles logs demo --role trainer` shows the whole log; `miles resume <run directory>` continues the run",
    ),
    "The disk becomes full": Situation(
        RunError,
        "the disk of <run directory> is full: <number> KiB are free",
        "free some space there; the same command continues the run",
    ),
    "The run is stopped": Situation(
        Interrupted, "<where it was stopped>", "the same command continues after step <number>"
    ),
    "A file that the trained steps were made with has changed": Situation(
        RunError,
        "step 'warmup' has <number> training steps that were made with other inputs: file DIR/pairs.jsonl changed",
        "undo that, or `miles fork demo NEW` to go on with it in another run, or `miles resume demo --restart warmup` "
        "to set those steps aside and begin again",
    ),
    "An engine's port is taken": Situation(
        EngineError,
        "cannot listen on 127.0.0.1:<port>: Address already in use",
        "submit again: another port will be tried",
    ),
    "The trainer's port is taken": Situation(
        TrainerError,
        "the trainer ranks cannot meet at 127.0.0.1:<port>: <reason>",
        "submit again: another port will be tried",
    ),
}
"""The step ends, its attempt is in the ledger with the reason, and the same command continues the run."""

GRADING = {
    "A grader returns something that is no number": Situation(
        DataError,
        "grader 'DIR/grader.py:grade' gave no reward for response 0 to prompt 'p7': it returned a str, not a number",
        "return a finite number, a bool, or a dict of them with the key 'reward'",
    ),
    "A grader returns a number that is not finite": Situation(
        DataError,
        "grader 'DIR/grader.py:grade' gave no reward for response 0 to prompt 'p7': it returned nan as 'reward'",
        "return a finite number, a bool, or a dict of them with the key 'reward'",
    ),
    "A grader returns a dict without `reward`": Situation(
        DataError,
        "grader 'DIR/grader.py:grade' gave no reward for response 0 to prompt 'p7': it returned a dict "
        "without 'reward' (keys: score)",
        "return a finite number, a bool, or a dict of them with the key 'reward'",
    ),
    "A grader takes too long": Situation(
        DataError,
        "grader 'DIR/grader.py:grade' took longer than 0.5 s, for response 0 to prompt 'p7'",
        'correct the grader or raise its timeout; on_error = "zero" scores such responses 0',
    ),
    "A grader ends its process": Situation(
        DataError,
        "grader 'DIR/grader.py:grade' ended its process (exit status 3), for response 0 to prompt 'p7'",
        'correct the grader or raise its timeout; on_error = "zero" scores such responses 0',
    ),
}
