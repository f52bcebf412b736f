"""engines.json of an attempt: where its inference engines are, which start of each, and whether they answer.

The supervisor writes the file; ranks read it whenever they want to know where an engine is now. Owns the file's
format. Who starts engines and judges their health is `miles.cluster.engines`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from miles.runs.files import write_atomic

ENGINES_VARIABLE = "MILES_ENGINES_FILE"
"""Environment variable with the path of the file, for ranks."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One inference engine as it is now."""

    index: int
    """Which of the step's engines, from 0. It keeps its index when it is started again."""
    url: str
    """`http://HOST:PORT`. Every start has its own port."""
    start: int
    """Which start of the engine in this attempt, from 1. A new start has the initial weights only."""
    ready: bool
    """Whether this start has answered. It may have died since: a client finds out by asking it."""


def write_endpoints(path: Path, endpoints: Sequence[Endpoint]) -> None:
    """Replace the file. Raises RunError when the disk refuses."""
    record = {"engines": [asdict(endpoint) for endpoint in endpoints]}
    write_atomic(path, json.dumps(record) + "\n", durable=False)


def read_endpoints(path: Path) -> list[Endpoint]:
    """The engines by index; none when no engine was started yet and there is no file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [Endpoint(**engine) for engine in json.loads(text)["engines"]]
