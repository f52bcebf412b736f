"""engines.json of an attempt: where its inference engines are, which start of each, and whether they answer.

The supervisor of the head writes it, those of other nodes `engines-1.json` and so on beside it; ranks read them
whenever they want to know where an engine is now. Owns the files' format. Who starts engines
and judges their health is `miles.cluster.engines`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def write_endpoints(path: Path, endpoints: Sequence[Endpoint], *, node: int = 0, nodes: int = 1) -> None:
    """Replace the file of one of `nodes` nodes, which all have as many engines. Raises RunError."""
    record = {"nodes": nodes, "engines": [asdict(endpoint) for endpoint in endpoints]}
    write_atomic(_of_node(path, node), json.dumps(record) + "\n", durable=False)


def read_endpoints(path: Path) -> list[Endpoint]:
    """The engines of all nodes by index; none when the head has started none yet and there is no file.

    Those of a node that has not said yet where they are have no URL, and are not ready.
    """
    record = _read(path)
    if record is None:
        return []
    engines = [Endpoint(**engine) for engine in record["engines"]]
    for node in range(1, record["nodes"]):
        other = _read(_of_node(path, node))
        first, count = node * len(record["engines"]), len(record["engines"])
        engines += (
            [Endpoint(index, "", 0, ready=False) for index in range(first, first + count)]
            if other is None
            else [Endpoint(**engine) for engine in other["engines"]]
        )
    return engines


def _of_node(path: Path, node: int) -> Path:
    """Every node has a file of its own, so that each has one writer."""
    return path if node == 0 else path.with_name(f"{path.stem}-{node}{path.suffix}")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return record
