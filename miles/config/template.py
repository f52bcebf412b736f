"""The commented run file that `miles init` writes.

Owns which keys a new user sees first; every other key stands there as a comment, with its default.
"""

from __future__ import annotations

import textwrap

from miles.config.fields import SECTIONS, Key, all_keys, type_name
from miles.config.files import preset_names
from miles.config.problems import shown

LIVE = {
    "rewards.grader": "exact",
    "rollout.prompts_per_step": 32,
    "rollout.group_size": 8,
    "rollout.max_response_tokens": 1024,
    "train.steps": 100,
    "train.lr": 1e-6,
    "train.max_tokens_per_micro_batch": 8192,
}
"""Keys that are written out; the others are comments."""

WIDTH = 100


def commented_config(name: str = "my-run", model: str = "path/to/model", data: str = "path/to/prompts.jsonl") -> str:
    """A run file that shows every key of every section; it loads where `model` and `data` exist."""
    parts = [
        "# A run of Miles: `miles submit FILE --local` starts it, `miles config check FILE` checks it.\n"
        "# Lines that begin with `# key =` show defaults. `miles config explain KEY` says more.",
        f"name = {shown(name)}",
        f'# Presets to start from: {", ".join(preset_names())}.\n# extends = "preset:dapo"',
        f"{_comment('Hugging Face model directory, relative to this file.')}\nmodel = {shown(model)}",
        f"{_comment('JSONL or Parquet file with a prompt and a label column.')}\ndata = {shown(data)}",
    ]
    parts += [_section(section) for section in SECTIONS if section not in ("model", "data")]
    return "\n\n".join(parts) + "\n"


def _section(section: str) -> str:
    title = f"[[{section}]]" if section == "rewards" else f"[{section}]"
    lines = [_comment((SECTIONS[section].__doc__ or "").strip().splitlines()[0]), title]
    for key in all_keys():
        if key.home == section:
            lines += [_comment(key.text), _assignment(key)]
    return "\n".join(lines)


def _assignment(key: Key) -> str:
    if key.name in LIVE:
        return f"{key.last} = {shown(LIVE[key.name])}"
    if key.default is None:
        return f"# {key.last} = <{type_name(key.field.annotation)}>"
    return f"# {key.last} = {shown(key.default)}"


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH))
