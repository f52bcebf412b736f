"""From the tree of a run file to complete steps: default steps, inherited sections, `needs` from references.

Owns what a step inherits and from where. Reading files belongs to `miles.config.files`, judging values to
`miles.config.validate` and `miles.config.rules`.
"""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.fields import STEP_KINDS, sections_of
from miles.config.files import PATH_KEYS
from miles.config.source import Node, merge

DEFAULT_STEPS = {"train": {"kind": "rl"}, "report": {"kind": "report", "needs": ["train"]}}
"""The steps of a run file without `[steps]`."""

ROW_KEYS = ("prompt", "label", "response", "metadata", "id", "system", "chat_template", "template_args")
"""Keys of `data` that say how rows are read; `eval.data` takes them over where it does not set them."""


def with_default_steps(root: Node) -> Node:
    """The tree with `DEFAULT_STEPS` where it has no steps."""
    steps = root.table().get("steps")
    if steps is not None and steps.value != {}:
        return root

    def node(value: object, key: str) -> Node:
        if isinstance(value, dict):
            value = {name: node(child, f"{key}.{name}") for name, child in value.items()}
        elif isinstance(value, list):
            value = [node(child, key) for child in value]
        return Node(value, root.place, key)

    return Node({**root.value, "steps": node(DEFAULT_STEPS, "steps")}, root.place, root.key)


def kind_of(step: Node) -> str | None:
    """Its kind, where that is a known one."""
    kind = step.find(("kind",))
    known = kind is not None and isinstance(kind.value, str) and kind.value in STEP_KINDS
    return kind.value if kind is not None and known else None


def complete_steps(root: Node) -> dict[str, Node]:
    """Every step of a known kind with the top-level sections beneath its own, and its full `needs`."""
    written = {name: step for name, step in root.nearest(("steps",)).table().items() if kind_of(step)}
    return {name: _with_needs(name, _with_defaults(step, root), list(written)) for name, step in written.items()}


def references(step: Node) -> Iterator[Node]:
    """The values of a step that are `step:NAME/...`."""
    for path in PATH_KEYS:
        node = step.find(path)
        if node is not None and isinstance(node.value, str) and node.value.startswith("step:"):
            yield node


def referred(reference: str) -> tuple[str, str]:
    """`step:prepare/model` as `("prepare", "model")`."""
    name, _, output = reference.removeprefix("step:").partition("/")
    return name, output


def _with_defaults(step: Node, root: Node) -> Node:
    kind = kind_of(step)
    assert kind is not None
    table = dict(step.value)
    for section in sections_of(kind):
        default = root.table().get(section)
        if default is not None:
            table[section] = merge(default, table[section]) if section in table else default
    heldout = table["eval"].table().get("data") if "eval" in table else None
    rows = table.get("data", root.table().get("data"))
    if heldout is not None and heldout.table() and rows is not None:
        inherited = {key: child for key, child in rows.table().items() if key in ROW_KEYS}
        data = Node({**inherited, **heldout.value}, heldout.place, heldout.key)
        table["eval"] = Node({**table["eval"].value, "data": data}, table["eval"].place, table["eval"].key)
    return Node(table, step.place, step.key)


def _with_needs(name: str, step: Node, names: list[str]) -> Node:
    needs = step.table().get("needs")
    if needs is not None and not isinstance(needs.value, list):
        return step
    entries = list(needs.value) if needs is not None else []
    if needs is None and kind_of(step) == "report":
        entries = [Node(other, step.place, step.key) for other in names if other != name]
    known = {entry.value for entry in entries if isinstance(entry.value, str)}
    for reference in references(step):
        needed = referred(reference.value)[0]
        if needed not in known:
            entries.append(Node(needed, reference.place, reference.key))
            known.add(needed)
    if not entries:
        return step
    place, key = (needs.place, needs.key) if needs is not None else (step.place, step.key)
    return Node({**step.value, "needs": Node(entries, place, key)}, step.place, step.key)
