"""What Slurm's commands call a job: its number, or the element of an array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Element:
    """One element of a job array, as Slurm's commands take it: `53_3`.

    Its number as a job comes when Slurm takes it out of the array, and the last element has the array's own: given to a
    command, that number would mean all of them.
    """

    array: int
    index: int

    def __str__(self) -> str:
        return f"{self.array}_{self.index}"


JobId: TypeAlias = int | Element
"""What Slurm's commands call a job."""


def parse_job_id(text: str) -> JobId:
    """`12` or `53_3`. Raises ValueError for anything else."""
    number, _, index = text.partition("_")
    return Element(int(number), int(index)) if index else int(number)
