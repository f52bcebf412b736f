"""Reading what an engine answers: tokens, versions, routed experts, and answers that cannot be right."""

import numpy as np
import pytest
from scripted_engine import answer, routed

from miles.data.sample import FinishReason
from miles.rollout.answers import ExpertShape, expert_shape, read_generation

SHAPE = ExpertShape(layers=2, top_k=2, experts=8)


def test_tokens_log_probs_reason_and_version():
    generation = read_generation(answer([65, 66], finish="length", weight_version="12"), 3, None)
    assert (generation.tokens, generation.log_probs) == ([65, 66], [-0.5, -0.5])
    assert generation.finish_reason is FinishReason.LENGTH
    assert generation.weight_versions == [12, 12]
    assert generation.routed_experts is None


def test_the_version_of_an_engine_that_never_got_weights_is_0():
    assert read_generation(answer([65]), 1, None).weight_versions == [0]


def test_versions_per_token_come_from_the_spans():
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 5}]
    generation = read_generation(answer([1, 2, 3], weight_version="4", weight_versions=spans), 1, None)
    assert generation.weight_versions == [3, 3, 4]


def test_an_aborted_response_keeps_its_partial_tokens_and_the_reason():
    aborted = answer([65], finish_reason={"type": "abort", "message": "Aborted", "status_code": None})
    generation = read_generation(aborted, 1, None)
    assert (generation.finish_reason, generation.abort_message) == (FinishReason.ABORT, "Aborted")
    assert generation.tokens == [65]


def test_a_request_aborted_before_its_prompt_was_read_has_nothing():
    aborted = {"text": "", "meta_info": {"finish_reason": {"type": "abort"}, "weight_version": "3"}}
    generation = read_generation(aborted, 3, SHAPE)
    assert (generation.tokens, generation.weight_versions, generation.routed_experts) == ([], [], None)


def test_routed_experts_get_their_shape_and_the_smallest_type():
    array = np.arange(4 * 2 * 2).reshape(4, 2, 2) % 8
    generation = read_generation(answer([1, 2], routed_experts=routed(array)), 3, SHAPE)
    assert generation.routed_experts is not None
    assert generation.routed_experts.dtype == np.uint8
    assert np.array_equal(generation.routed_experts, array)
    assert ExpertShape(1, 1, 256).dtype == np.uint8
    assert ExpertShape(1, 1, 257).dtype == np.uint16


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_expert_shape_of_moe_configs(name):
    config = {"num_hidden_layers": 4, "num_experts_per_tok": 2, name: 16}
    assert expert_shape(config) == ExpertShape(4, 2, 16)
    assert expert_shape({"text_config": config}) == ExpertShape(4, 2, 16)


def test_dense_models_have_no_expert_shape():
    assert expert_shape({"num_hidden_layers": 4}) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (answer([1, 2], output_token_logprobs=[[-0.5, 1, None]]), "1 tokens do not belong to the 2"),
        (answer([1], output_token_logprobs=[[-0.5, 9, None]]), "do not belong"),
        (answer([1], output_token_logprobs=[[float("nan"), 1, None]]), "not finite"),
        (answer([1], weight_version="step-1"), "step-1"),
        (answer([1, 2], weight_versions=[{"version": "1", "start": 0, "end": 1}]), "cover 1 of 2"),
        (answer([1], finish="exploded"), "exploded"),
        (answer([1]), "--enable-return-routed-experts"),
        (answer([1], routed_experts="???"), "not base64"),
        (answer([1], routed_experts=routed(np.zeros(3))), "3 routed experts, where (1, 2, 2)"),
        (answer([1], routed_experts=routed(np.full(4, 8))), "from 8 to 8; the model has 8"),
    ],
)
def test_answers_that_cannot_be_right(given, words):
    with pytest.raises(ValueError, match=r".*") as error:
        read_generation(given, 1, SHAPE)
    assert words in str(error.value)
