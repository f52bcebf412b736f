"""Samples that grow, are cut off and go on."""

import numpy as np
import pytest

from miles.data.sample import FinishReason, Group, Prompt, Sample
from miles.rollout.answers import Generation
from miles.rollout.closing import Progress
from miles.rollout.responses import cut_off, extend, new_group, new_tokens, progress_of
from miles.rollout.text import ResponseText

PROMPT = Prompt("p", [7, 8], "")
TEXT = ResponseText(lambda tokens: "".join(map(str, tokens)))


def generation(tokens: list[int], version: int, finish: FinishReason, rows: int | None = None) -> Generation:
    routes = None if rows is None else np.full((rows, 1, 1), version, dtype=np.uint8)
    return Generation(tokens, [-0.5] * len(tokens), [version] * len(tokens), finish, "", routes)


@pytest.fixture
def sample() -> Sample:
    """Two tokens of version 0, three of version 1, finished and graded."""
    fresh = new_group(PROMPT, run_seed=0, size=1, position=0, epoch=0, born=1).samples[0]
    extend(fresh, generation([1, 2], 0, FinishReason.ABORT, rows=3), TEXT, 9)
    extend(fresh, generation([3, 4, 5], 1, FinishReason.STOP, rows=6), TEXT, 9)
    fresh.reward, fresh.reward_parts = 1.0, {"exact": 1.0}
    return fresh


def test_a_continuation_keeps_the_routes_of_the_weights_that_sampled(sample):
    assert sample.response_tokens == [1, 2, 3, 4, 5]
    assert sample.weight_versions == [0, 0, 1, 1, 1]
    assert (len(sample.log_probs), sample.loss_mask) == (5, [1] * 5)
    assert sample.routed_experts[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert (sample.finish_reason, sample.text) == (FinishReason.STOP, "1234")


@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.ABORT])
def test_a_response_is_as_long_as_allowed_over_all_requests(finish):
    sample = Sample(PROMPT, 0, 0)
    extend(sample, generation([1, 2], 0, finish), TEXT, 4)
    assert (sample.finish_reason, sample.text) == (None, "")
    extend(sample, generation([3, 4], 0, finish), TEXT, 4)
    assert (sample.finish_reason, sample.text) == (FinishReason.LENGTH, "1234")


def test_an_aborted_request_without_output_changes_nothing(sample):
    fresh = Sample(PROMPT, 0, 0)
    extend(fresh, generation([], 0, FinishReason.ABORT), TEXT, 4)
    assert fresh == Sample(PROMPT, 0, 0)


def test_growing_leaves_shallow_copies_as_they_were():
    sample = Sample(PROMPT, 0, 0)
    lists = sample.response_tokens, sample.log_probs, sample.loss_mask, sample.weight_versions
    extend(sample, generation([1, 2], 0, FinishReason.ABORT), TEXT, 4)
    assert lists == ([], [], [], [])


def test_a_sample_that_is_cut_off_is_as_if_it_had_not_gone_on(sample):
    (cut,) = cut_off(Group(PROMPT, [sample]), 1, 1).samples
    assert (cut.response_tokens, cut.weight_versions, cut.loss_mask) == ([1, 2, 3], [0, 0, 1], [1, 1, 1])
    assert (len(cut.log_probs), len(cut.routed_experts)) == (3, 4)
    assert (cut.finish_reason, cut.text, cut.reward, cut.reward_parts) == (None, "", None, {})
    assert len(sample.response_tokens) == 5, "the original stays"


def test_a_sample_that_had_ended_before_the_cut_keeps_its_end_but_no_reward(sample):
    (kept,) = cut_off(Group(PROMPT, [sample]), 1, 3).samples
    assert (kept.response_tokens, kept.finish_reason, kept.text) == ([1, 2, 3, 4, 5], FinishReason.STOP, "1234")
    assert (kept.reward, kept.reward_parts) == (None, {})


def test_a_sample_cut_off_at_nothing_is_new():
    sample = Sample(PROMPT, 0, 5)
    extend(sample, generation([1, 2], 0, FinishReason.STOP, rows=3), TEXT, 9)
    assert cut_off(Group(PROMPT, [sample]), 0, 0).samples == [Sample(PROMPT, 0, 5)]


def test_progress_counts_tokens_of_the_newest_weights(sample):
    group = Group(PROMPT, [sample, Sample(PROMPT, 1, 0)])
    assert new_tokens(sample, 1) == 3
    assert new_tokens(sample, 2) == 0
    assert progress_of(group, 1) == Progress((3, 0), (True, False))
    assert progress_of(Group(PROMPT, [sample]), 2) == Progress((0,), (True,), graded=True, equal=True)
