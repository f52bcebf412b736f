"""done.json: the record that a step is done, with which inputs, and what it left behind."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from miles.runs.files import write_atomic
from miles.runs.paths import RunPaths
from miles.workflow.fingerprint import Inputs


@dataclass(frozen=True, slots=True)
class Done:
    """A step that ended well."""

    inputs: Inputs
    attempt: int
    finished: float
    """Unix time, in seconds."""
    seconds: float
    """Duration of the attempt that did it."""
    outputs: dict[str, int]
    """Size in bytes of every file of the step's directory, by relative path."""


def write_done(paths: RunPaths, name: str, inputs: Inputs, *, attempt: int, finished: float, seconds: float) -> None:
    """Record that a step is done, with the outputs that lie in its directory now."""
    directory = paths.step(name)
    directory.mkdir(parents=True, exist_ok=True)
    outputs = {
        str(file.relative_to(directory)): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file not in (paths.done(name), paths.inputs(name))
    }
    done = Done(inputs, attempt, finished, seconds, outputs)
    record = {"fingerprint": inputs.fingerprint, **asdict(done)}
    write_atomic(paths.done(name), json.dumps(record, indent=2) + "\n")


def read_done(paths: RunPaths, name: str) -> Done | None:
    """The record of a step; None when it is not done."""
    try:
        record = json.loads(paths.done(name).read_text())
    except FileNotFoundError:
        return None
    inputs = Inputs(**record["inputs"])
    return Done(inputs, record["attempt"], record["finished"], record["seconds"], record["outputs"])


def damaged_outputs(paths: RunPaths, name: str, done: Done) -> list[str]:
    """Recorded outputs that are missing or have another size, by relative path."""
    return [
        file
        for file, size in done.outputs.items()
        if not (path := paths.step(name) / file).is_file() or path.stat().st_size != size
    ]
