"""From a position of the endless sequence of draws to a group with its prompt and seeds. Pure.

The sequence itself belongs to `miles.data.order`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from miles.data.order import draws
from miles.data.sample import Group, Prompt
from miles.rollout.responses import new_group


@dataclass(frozen=True, slots=True)
class Source:
    """The draws of one stage."""

    prompts: Sequence[Prompt]
    prompts_per_step: int
    group_size: int
    seed: int
    """The run's."""
    shuffle: bool

    def group(self, position: int, *, born: int) -> Group:
        """The group of a position, without tokens, drawn in step `born`."""
        (draw,) = draws(len(self.prompts), self.prompts_per_step, position, 1, seed=self.seed, shuffle=self.shuffle)
        return new_group(
            self.prompts[draw.index],
            run_seed=self.seed,
            size=self.group_size,
            position=position,
            epoch=draw.epoch,
            born=born,
        )

    def completed(self, group: Group, carried: Group | None) -> Group:
        """A group from a damaged journal with all its samples: what is missing is as it was carried, or begins anew."""
        rest = carried or self.group(group.position, born=group.born)
        found = {sample.index: sample for sample in group.samples}
        return replace(group, samples=[found.get(sample.index, sample) for sample in rest.samples])
