"""Text and stop strings of a response: the same, wherever it was interrupted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.data.sample import FinishReason, Prompt, Sample
from miles.engines.embedded.request import Request, answer, finish_reason
from miles.engines.embedded.sampling import SamplingParams
from miles.rollout.answers import read_generation
from miles.rollout.responses import extend
from miles.rollout.text import ResponseText

END = 0
VOCABULARY = ["<end>", "a", "b", "ab", "##", "#", "é"]


class Tokenizer:
    """Just enough of one for the embedded engine."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        assert skip_special_tokens
        return "".join(VOCABULARY[token] for token in tokens if token != END)


def engine_answers(story: list[int], prompt: list[int], most: int, stop: tuple[str, ...]) -> dict:
    """What the embedded engine answers when the model would go on with `story`."""
    params = SamplingParams(
        max_new_tokens=most, temperature=1.0, top_p=1.0, top_k=-1, seed=0, stop=stop, stop_token_ids=frozenset({END})
    )
    request = Request("r", prompt, params, print, return_log_probs=True)
    for token in story:
        request.append(token, -0.5, "0")
        request.finish = finish_reason(request, frozenset({END}), Tokenizer())
        if request.finish is not None:
            return answer(request, "0", Tokenizer())
    request.finish = {"type": "abort", "message": "Aborted"}
    return answer(request, "0", Tokenizer())


def told(story: list[int], chunks: list[int], stop: tuple[str, ...], longest: int) -> Sample:
    """The response that requests of at most these lengths put together."""
    sample = Sample(Prompt("p", [1], ""), 0, 0)
    text = ResponseText(Tokenizer().decode, stop)
    for chunk in [*chunks, *[longest] * longest]:
        if sample.finish_reason is not None:
            break
        known = len(sample.response_tokens)
        most = min(chunk, longest - known)
        generation = read_generation(engine_answers(story[known:], sample.tokens, most, stop), known, None)
        extend(sample, generation, text, longest)
    assert sample.finish_reason is not None
    return sample


stories = st.lists(st.integers(1, len(VOCABULARY) - 1), min_size=1, max_size=14).map(lambda story: [*story, END])
stops = st.lists(st.sampled_from(["ab", "#", "##b", "bab", "é#", "a"]), max_size=2, unique=True).map(tuple)


@settings(deadline=None)
@given(stories, st.lists(st.integers(1, 4), max_size=8), stops, st.integers(1, 20))
def test_chunks_change_neither_tokens_nor_text_nor_the_reason(story, chunks, stop, longest):
    whole, parts = told(story, [], stop, longest), told(story, chunks, stop, longest)
    assert parts == whole
    expected = engine_answers(story, [1], longest, stop)
    assert whole.text == expected["text"]
    assert whole.response_tokens == expected["output_ids"]
    assert whole.finish_reason == expected["meta_info"]["finish_reason"]["type"]


def test_a_stop_string_over_two_requests_ends_the_response_where_it_is_complete():
    sample = told([1, 4, 5, 2, 2, 2, END], [2, 3], ("##b", "###"), 20)
    assert sample.response_tokens == [1, 4, 5]
    assert (sample.text, sample.finish_reason) == ("a", FinishReason.STOP)


@pytest.mark.parametrize(
    ("tokens", "finish", "text"),
    [([1, 2, END], FinishReason.STOP, "ab"), ([1, 2], FinishReason.LENGTH, "ab"), ([1, 4], FinishReason.STOP, "a")],
)
def test_what_ended_a_response_is_not_part_of_its_text(tokens, finish, text):
    assert ResponseText(Tokenizer().decode, ("##",)).of(tokens, finish) == text
