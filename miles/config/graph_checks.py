"""What only the whole run shows: names of the run and its steps, what they need, what they refer to.

Works on the tree, so that these problems are found whatever else is wrong. The order in which steps run is
`miles.workflow.graph`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.config.fields import STEP_KINDS
from miles.config.problems import Problem, shown
from miles.config.source import Node
from miles.config.steps import kind_of, references, referred
from miles.errors import did_you_mean

RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
STEP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def graph_problems(root: Node, steps: dict[str, Node]) -> Iterator[Problem]:
    """All problems of names, needs and references; `steps` are the complete ones."""
    yield from _names(root)
    names = list(root.nearest(("steps",)).table())
    for name, step in steps.items():
        yield from _references(name, step, steps, names)
        yield from _needs(name, step, names)
    yield from _cycle(steps)


def _names(root: Node) -> Iterator[Problem]:
    run = root.table().get("name")
    if run is not None and isinstance(run.value, str) and not RUN_NAME.fullmatch(run.value):
        yield Problem(
            run.place,
            f"name = {shown(run.value)}: a run name has letters, digits, '.', '_' and '-' only, "
            "and does not begin with '.' or '-'",
            f'for example name = "{_cleaned(run.value)}"',
        )
    for name, step in root.nearest(("steps",)).table().items():
        if not STEP_NAME.fullmatch(name):
            yield Problem(
                step.place,
                f"step {shown(name)}: a step name has letters, digits, '_' and '-' only, and does not begin with '-'",
                f"for example [steps.{_cleaned(name).replace('.', '-')}]",
            )


def _cleaned(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "my-run"


def _references(name: str, step: Node, steps: dict[str, Node], names: list[str]) -> Iterator[Problem]:
    for node in references(step):
        other, output = referred(node.value)
        given = f"{node.key} = {shown(node.value)}"
        if other == name:
            yield Problem(
                node.place,
                f"{given}: step {name} refers to its own output",
                f"name another step, or set the key for step {name} only, in [steps.{name}]",
            )
        elif other not in names:
            hint = did_you_mean(other, names)
            yield Problem(node.place, f"{given}: no step '{other}'.{hint}", "the steps are " + ", ".join(names))
        elif other in steps:
            kind = kind_of(steps[other]) or "report"
            outputs = STEP_KINDS[kind].outputs
            if output not in outputs:
                yield Problem(
                    node.place,
                    f"{given}: step {other} (kind {kind}) has no output '{output}'." + did_you_mean(output, outputs),
                    f"its outputs are {', '.join(outputs)}",
                )


def _needs(name: str, step: Node, names: list[str]) -> Iterator[Problem]:
    if "needs" not in step.table():
        return
    referenced = {referred(node.value)[0] for node in references(step)}
    for entry in step.nearest(("needs",)).value:
        if not isinstance(entry.value, str) or entry.value in referenced:
            continue
        if entry.value == name:
            yield Problem(entry.place, f"steps.{name}.needs: step {name} needs itself", f'remove "{name}" from it')
        elif entry.value not in names:
            hint = did_you_mean(entry.value, names)
            message = f"steps.{name}.needs: no step '{entry.value}'.{hint}"
            yield Problem(entry.place, message, "the steps are " + ", ".join(names))


def _cycle(steps: dict[str, Node]) -> Iterator[Problem]:
    """The first circle of steps that need each other, longer than one step."""
    needs = {name: [other for other in _needed(step) if other in steps] for name, step in steps.items()}
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return None
        circles = (visit(other, [*path, name]) for other in needs[name] if other != name)
        circle = next(filter(None, circles), None)
        finished.add(name)
        return circle

    circle = next(filter(None, (visit(name, []) for name in steps)), None)
    if circle:
        entries = steps[circle[0]].nearest(("needs",)).value
        entry = next(entry for entry in entries if entry.value == circle[1])
        yield Problem(
            entry.place,
            "steps need each other in a circle: " + " -> ".join(circle),
            f"remove a need or a step: reference between two of them, such as {circle[0]} -> {circle[1]}",
        )


def _needed(step: Node) -> list[str]:
    needs = step.table().get("needs")
    entries = needs.value if needs is not None and isinstance(needs.value, list) else []
    return [entry.value for entry in entries if isinstance(entry.value, str)]
