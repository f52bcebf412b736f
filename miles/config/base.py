"""What every section of the run file is built on: the base model, and marks of single keys."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

NonNegativeInt = Annotated[int, Field(ge=0)]


class Mark(Enum):
    """Marks of single keys."""

    MAY_CHANGE = "may change"
    """The key says how the work is laid out, bounded or watched; state that exists stays as good as it was."""


_T = TypeVar("_T")
MayChange = Annotated[_T, Mark.MAY_CHANGE]
"""Of a key without it, the first value holds for the life of the run."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, types are not coerced, instances are frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        defer_build=True,  # building every section's own validator at import costs 0.1 s
    )
