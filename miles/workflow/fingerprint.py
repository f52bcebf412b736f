"""What a step's result depends on, and the fingerprint of it.

Two starts of a step with the same fingerprint give the same result as far as Miles can tell: same resolved
config and seed, same user files (path, size, time of change), same inputs from other steps, same version of
Miles. Keys that may change (`miles.config.changes`) are no part of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

import miles
from miles.config.changes import lasting_values, raisable_steps
from miles.config.schema import EvalStep, RlStep, RunConfig, SftStep
from miles.runs.paths import STEP_PREFIX
from miles.workflow.graph import needed_steps
from miles.workflow.kinds import AnyStep


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a step's result depends on."""

    version: str
    """Version of Miles."""
    config: str
    """Digest of the seed and of the step's resolved config, as far as results depend on it."""
    budget: int | None
    """`train.steps` of a stage that may be given more later; None: fixed, and in the digest."""
    files: dict[str, str]
    """User files by path: size in bytes and time of change, or `missing`."""
    steps: dict[str, str]
    """Fingerprints of the needed steps by name."""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits."""
        return _digest(asdict(self))

    def difference(self, old: Inputs) -> str:
        """What changed since `old`, for a person; empty when nothing did."""
        changed = [
            f"{kind} {name} changed"
            for kind, new_values, old_values in (
                ("file", self.files, old.files),
                ("step", self.steps, old.steps),
            )
            for name in sorted(new_values.keys() | old_values.keys())
            if new_values.get(name) != old_values.get(name)
        ]
        if self.config != old.config:
            changed.append("config changed")
        if self.budget != old.budget:
            changed.append(f"train.steps {old.budget} -> {self.budget}")
        if self.version != old.version:
            changed.append(f"Miles {old.version} -> {self.version}")
        return ", ".join(changed)

    def conflict(self, old: Inputs) -> str:
        """What changed since `old` so that state made with it is of no use here; empty when the state still holds.

        More steps of a stage go on from the ones that it has.
        """
        grown = self.budget is not None and old.budget is not None and self.budget > old.budget
        return self.difference(replace(old, budget=self.budget) if grown else old)


def inputs_of(config: RunConfig, name: str, fingerprints: dict[str, str]) -> Inputs:
    """What step `name` depends on now, given the fingerprints of the steps it needs."""
    step = config.steps[name]
    return Inputs(
        version=miles.__version__,
        config=_digest({"seed": config.seed, "step": lasting_values(step)}),
        budget=raisable_steps(step),
        files={path: _state(Path(path)) for path in user_files(step)},
        steps={needed: fingerprints[needed] for needed in needed_steps(step)},
    )


def user_files(step: AnyStep) -> list[str]:
    """Paths of the model, data and grader files of a step that are the user's own, directories expanded."""
    return list(dict.fromkeys(file for path in user_paths(step) for file in _expand(path)))


def user_paths(step: AnyStep) -> list[Path]:
    """The same as the run file names them: directories as one."""
    named: list[str | None] = []
    if isinstance(step, SftStep | RlStep | EvalStep):
        named += [step.model.path, step.model.tokenizer]
    if isinstance(step, SftStep | RlStep):
        named.append(step.data.path)
    if isinstance(step, RlStep | EvalStep):
        named.append(step.eval.data.path if step.eval.data else None)
        named += [grader_file(reward.grader) for reward in step.rewards]
    own = (path for path in named if path is not None and not path.startswith(STEP_PREFIX))
    return [Path(path) for path in dict.fromkeys(own)]


def grader_file(grader: str) -> str | None:
    """The file of a grader given as `path/file.py:function`; None for graders that are no file."""
    file, colon, _ = grader.rpartition(":")
    return file if colon and file.endswith(".py") else None


def _expand(path: Path) -> list[str]:
    if not path.is_dir():
        return [str(path)]
    return sorted(str(file) for file in path.rglob("*") if file.is_file())


def _state(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _digest(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())
