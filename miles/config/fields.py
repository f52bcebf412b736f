"""Every key of the run file, read off the schema: where it lives, its type, bound and default.

Owns the introspection that error messages, `miles config explain` and the reference page share.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from miles.config import cluster, schema
from miles.config.base import Section
from miles.config.schema import RunConfig, StepBase

STEP_KINDS: dict[str, type[StepBase]] = {
    "tiny-task": schema.TinyTaskStep,
    "sft": schema.SftStep,
    "rl": schema.RlStep,
    "eval": schema.EvalStep,
    "report": schema.ReportStep,
}

SECTIONS: dict[str, type[Section]] = {
    "model": schema.ModelSection,
    "data": schema.DataSection,
    "rewards": schema.RewardSection,
    "rollout": schema.RolloutSection,
    "algorithm": schema.AlgorithmSection,
    "train": schema.TrainSection,
    "engine": schema.EngineSection,
    "eval": schema.EvalSection,
    "checkpoint": schema.CheckpointSection,
    "journal": schema.JournalSection,
    "local": schema.LocalSection,
    "tracking": schema.TrackingSection,
    "slurm": cluster.SlurmSection,
    "container": cluster.ContainerSection,
}
"""Sections that may stand at the top level (defaults of every step that has them) and in a step."""

RUN_KEYS = tuple(key for key in RunConfig.model_fields if key != "steps")
"""Plain keys of the top level."""

KIND = FieldInfo(annotation=Literal[tuple(STEP_KINDS)], description="What the step does.")  # type: ignore[arg-type]

TOP_LEVEL = (*RUN_KEYS, "extends", *SECTIONS, "steps")


def own_keys(kind: str) -> tuple[str, ...]:
    """Keys that a step of this kind has beside sections."""
    return tuple(key for key in STEP_KINDS[kind].model_fields if key not in SECTIONS)


def sections_of(kind: str) -> tuple[str, ...]:
    """Sections that a step of this kind has."""
    return tuple(key for key in STEP_KINDS[kind].model_fields if key in SECTIONS)


def kinds_with(section: str) -> tuple[str, ...]:
    """Kinds of steps that have this section."""
    return tuple(kind for kind in STEP_KINDS if section in STEP_KINDS[kind].model_fields)


@dataclass(frozen=True, slots=True)
class Key:
    """One documented key."""

    name: str
    """`train.lr`, `eval.data.path`, `name`, or `steps.NAME.layers` for what only a step has."""
    field: FieldInfo
    owner: type[Section]
    kinds: tuple[str, ...]
    """Kinds of steps that have it; empty for keys of the run."""

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def home(self) -> str:
        """The table that it is written in: `train`, `steps.NAME`, or empty for the top level."""
        return self.name.rpartition(".")[0]

    @property
    def text(self) -> str:
        """Its documentation."""
        return self.field.description or docstrings()[self.owner.__name__, self.last]

    @property
    def required(self) -> bool:
        return self.field.is_required()

    @property
    def default(self) -> Any:
        """Plain default value; None also where it is required."""
        value = None if self.required else self.field.get_default(call_default_factory=True)
        if isinstance(value, list):
            return [item.model_dump(exclude_defaults=True) if isinstance(item, Section) else item for item in value]
        return value.value if isinstance(value, Enum) else value


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key, in the order of the reference page."""
    return tuple(_keys())


def _keys() -> Iterator[Key]:
    for name in RUN_KEYS:
        yield Key(name, RunConfig.model_fields[name], RunConfig, ())
    for section, model in SECTIONS.items():
        yield from _section_keys(section, model, kinds_with(section))
    shared = {"kind": KIND, "needs": StepBase.model_fields["needs"]}
    for name, field in shared.items():
        yield Key(f"steps.NAME.{name}", field, StepBase, tuple(STEP_KINDS))
    for kind, step in STEP_KINDS.items():
        for name in own_keys(kind):
            if name not in shared:
                yield Key(f"steps.NAME.{name}", step.model_fields[name], step, (kind,))


def _section_keys(prefix: str, model: type[Section], kinds: tuple[str, ...]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        yield Key(f"{prefix}.{name}", field, model, kinds)
        if (inner := section_type(field.annotation)) is not None:
            yield from _section_keys(f"{prefix}.{name}", inner, kinds)


@cache
def docstrings() -> dict[tuple[str, str], str]:
    """The string under each field of the schema, by class and field.

    Pydantic can collect them itself, but does so whenever the schema is imported, which costs 0.05 s.
    """
    found = {}
    modules = (schema, cluster)
    for node in [node for module in modules for node in ast.parse(inspect.getsource(module)).body]:
        if isinstance(node, ast.ClassDef):
            for field, text in pairwise(node.body):
                match field, text:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(words))),
                    ):
                        found[node.name, name] = " ".join(words.split())
    return found


def section_type(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation (`EvalSection`, `DataSection | None`, `list[RewardSection]`)."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for item in get_args(annotation) if (found := section_type(item))), None)


def type_name(annotation: Any) -> str:
    """An annotation in words: `whole number`, `list of strings`, `"a" or "b"`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin in (UnionType, Union):
        return alternatives(type_name(item) for item in get_args(annotation) if item is not NoneType)
    if origin is Literal:
        return alternatives(f'"{choice}"' for choice in get_args(annotation))
    if origin is list:
        return f"list of {_PLURALS.get(type_name(get_args(annotation)[0]), 'tables')}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return alternatives(f'"{choice.value}"' for choice in annotation)
    return _WORDS.get(annotation, "table")


def alternatives(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


_WORDS: dict[Any, str] = {int: "whole number", float: "number", str: "string", bool: "true or false"}
_PLURALS = {"whole number": "whole numbers", "number": "numbers", "string": "strings"}


def bounds(field: FieldInfo) -> str:
    """Bounds of a number, or of those in a list, in words (`> 0`, `>= 0 and < 1`); empty without any."""
    whole = "whole number" in type_name(field.annotation)
    words = []
    for item in _constraints(field):
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if (bound := getattr(item, attribute, None)) is not None:
                words.append(f">= {bound + 1}" if whole and sign == ">" else f"{sign} {bound:g}")
    return " and ".join(words)


def form(field: FieldInfo) -> tuple[str, str] | None:
    """How a text of this field is written, and an example, where it has a pattern."""
    patterns = [getattr(item, "pattern", None) for item in _constraints(field)]
    return next((cluster.FORMS[pattern] for pattern in patterns if pattern is not None), None)


def _constraints(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    for item in get_args(field.annotation):
        if get_origin(item) is Annotated:
            for constraint in item.__metadata__:
                yield from constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]
