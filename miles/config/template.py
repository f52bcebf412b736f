"""The commented run file that `miles init` writes.

Owns which keys a new user sees first; every other key stands there as a comment, with its default.
"""

from __future__ import annotations

import textwrap
from typing import Any

from miles.config.fields import SECTIONS, Key, all_keys, type_name
from miles.config.files import preset_names
from miles.config.problems import shown

LIVE = {"rewards.grader": "exact", "train.steps": 100, "train.lr": 1e-6}
"""Keys that are written out beside `name`, `model` and `data.path`; none that a preset sets, because a key in the
file would undo it. The others are comments.
"""

EXAMPLES = {"eval.data": "path/to/heldout.jsonl"}
"""What stands in the comment of a key whose type says too little."""

WIDTH = 100


def commented_config(name: str = "my-run", model: str = "path/to/model", data: str = "path/to/prompts.jsonl") -> str:
    """A run file that shows every key of every section; it loads where `model` and `data` exist."""
    presets = f"Presets to start from: {', '.join(preset_names())}. A machine without a GPU wants cpu."
    parts = [
        "# A run of Miles: `miles submit FILE --local` starts it, `miles config check FILE` checks it.\n"
        "# Lines that begin with `# key =` show defaults. `miles config explain KEY` says more.",
        f"name = {shown(name)}",
        f'{_comment(presets)}\n# extends = "preset:cpu"',
        f"{_comment('Hugging Face model directory, relative to this file.')}\nmodel = {shown(model)}",
    ]
    live = LIVE | {"data.path": data}
    parts += [_section(section, live) for section in SECTIONS if section != "model"]
    return "\n\n".join(parts) + "\n"


def _section(section: str, live: dict[str, Any]) -> str:
    title = f"[[{section}]]" if section == "rewards" else f"[{section}]"
    lines = [_comment((SECTIONS[section].__doc__ or "").strip().splitlines()[0]), title]
    for key in all_keys():
        if key.home == section:
            lines += [_comment(key.text), _assignment(key, live)]
    return "\n".join(lines)


def _assignment(key: Key, live: dict[str, Any]) -> str:
    if key.name in live:
        return f"{key.last} = {shown(live[key.name])}"
    if key.name in EXAMPLES:
        return f"# {key.last} = {shown(EXAMPLES[key.name])}"
    if key.default is None:
        return f"# {key.last} = <{type_name(key.field.annotation)}>"
    return f"# {key.last} = {shown(key.default)}"


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH))
