"""Ranks of several nodes: what a number of nodes, a range of them, and this machine alone can hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from miles.config.load import load_run
from miles.config.problems import InvalidConfigError
from miles.config.rules import refuse_ranks_of_one_node
from miles.config.slurm_rules import time_limit_seconds
from miles.errors import ConfigError

HEAD = 'name = "r"\nmodel = "hf"\ndata = "prompts.jsonl"\n'
TWO_PARTS = HEAD + "[train]\ntensor_parallel_size = 2\n[local]\nranks = {ranks}\n[slurm]\nnodes = {nodes}\n"


@pytest.mark.parametrize(("ranks", "nodes"), [(2, "1"), (1, "2"), (2, '"1-5"'), (2, '"1-999999999"')])
def test_ranks_of_all_nodes_together_hold_the_model(write: Callable[..., Path], ranks: int, nodes: str) -> None:
    load_run(write(TWO_PARTS.format(ranks=ranks, nodes=nodes)))


@pytest.mark.parametrize(
    ("nodes", "bad"), [('"1-2"', "local.ranks = 1 is"), ('"2-4"', "on 3 nodes"), ("3", "on 3 nodes")]
)
def test_a_number_of_nodes_that_does_not_hold_it_is_named(write: Callable[..., Path], nodes: str, bad: str) -> None:
    with pytest.raises(InvalidConfigError, match=bad):
        load_run(write(TWO_PARTS.format(ranks=1, nodes=nodes)))


def test_what_needs_two_nodes_does_not_run_on_this_one(write: Callable[..., Path]) -> None:
    refuse_ranks_of_one_node(load_run(write(TWO_PARTS.format(ranks=2, nodes="2"))))
    with pytest.raises(ConfigError, match=r"step 'train' needs several nodes: on this one, local\.ranks = 1 is not"):
        refuse_ranks_of_one_node(load_run(write(TWO_PARTS.format(ranks=1, nodes="2"))))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("4", 240), ("4:30", 270), ("4:00:00", 14400), ("2-12", 216000), ("1-0:30", 88200), ("1-00:00:05", 86405)],
)
def test_time_limits_in_every_form(text: str, seconds: int) -> None:
    assert time_limit_seconds(text) == seconds
