"""One protocol, two servers: the same requests, shapes and semantics on the embedded engine and on real SGLang.

`docs/engines.md` lists the deliberate differences; each is a test here that names both behaviours.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines.conftest import CONTEXT, KINDS, TOKEN, Engine

PROMPT = [5, 6, 7, 8, 9, 10]
LONG = {"temperature": 0.0, "max_new_tokens": 300, "ignore_eos": True}


@pytest.fixture(scope="module")
def reference(tiny_moe: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_moe / "model", dtype=torch.float32).eval()


def log_probs_of(model: Any, tokens: list[int], temperature: float = 1.0) -> list[float]:
    """log p(tokens[t] | tokens[:t]) for t >= 1, by the plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double() / temperature
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def routes_of(answer: dict[str, Any]) -> np.ndarray:
    meta = answer["meta_info"]
    rows = meta["prompt_tokens"] + meta["completion_tokens"] - 1
    return np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4").reshape(rows, 2, 2)


@pytest.mark.sglang
def test_the_suite_runs_against_real_sglang() -> None:
    if "MILES_SGLANG_PYTHON" not in os.environ:
        pytest.skip("MILES_SGLANG_PYTHON does not name a Python that has SGLang (tests/engines/sglang_cpu/install.sh)")
    assert any(getattr(kind, "values", None) == ("sglang",) for kind in KINDS)


# Authorization and information


def test_health_needs_no_token(engine: Engine) -> None:
    assert engine.get("/health", token=None).status_code == 200
    assert engine.get("/health_generate", token=None).status_code == 200


@pytest.mark.parametrize("token", [None, "wrong"])
def test_everything_else_needs_the_token(engine: Engine, token: str | None) -> None:
    answer = engine.send("/generate", {"input_ids": PROMPT}, token=token)
    assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
    assert engine.get("/server_info", token=token).status_code == 401


def test_model_info(engine: Engine) -> None:
    info = engine.get("/model_info").json()
    assert info["model_path"] == str(engine.model)
    assert info["is_generation"] is True
    assert info["weight_version"] == "default"
    assert info["architectures"] == ["Qwen3MoeForCausalLM"]


def test_server_info(engine: Engine) -> None:
    info = engine.get("/server_info").json()
    assert info["dtype"] == "float32"
    assert info["max_running_requests"] == 16
    assert len(info["internal_states"]) == 1


def test_unknown_routes(engine: Engine) -> None:
    assert engine.get("/nothing").status_code == 404
    assert engine.get("/nothing").json() == {"detail": "Not Found"}
    assert engine.get("/generate").status_code == 405


# Generation


def test_answer_of_one_request(engine: Engine) -> None:
    answer = engine.generate(
        PROMPT, temperature=0, max_new_tokens=4, ignore_eos=True,
        body_rid="mine", body_logprob_start_len=0, body_return_routed_experts=True,
    )  # fmt: skip
    meta = answer["meta_info"]
    assert isinstance(answer["text"], str)
    assert len(answer["output_ids"]) == 4
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["num_retractions"]) == (6, 4, 0)
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 4}]
    assert meta["input_token_logprobs"][0] == [None, PROMPT[0], None]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == PROMPT
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    assert meta["output_token_logprobs_length"] == 4
    assert meta["e2e_latency"] > 0
    assert meta["dp_rank"] is None
    assert isinstance(meta["cached_tokens"], int)
    assert routes_of(answer).shape == (9, 2, 2)


def test_greedy_tokens_and_log_probs_are_the_models(engine: Engine, reference: Any) -> None:
    answer = engine.generate(PROMPT, temperature=0, max_new_tokens=12, ignore_eos=True, body_logprob_start_len=0)
    tokens = PROMPT + answer["output_ids"]
    with torch.no_grad():
        best = reference(input_ids=torch.tensor([tokens])).logits[0].argmax(-1).tolist()
    assert answer["output_ids"] == best[len(PROMPT) - 1 : -1]
    expected = log_probs_of(reference, tokens)
    meta = answer["meta_info"]
    got = [entry[0] for entry in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]]
    assert got == pytest.approx(expected, abs=1e-5)


def test_output_log_probs_are_temperature_scaled_and_not_truncated(engine: Engine, reference: Any) -> None:
    answer = engine.generate(
        PROMPT, temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=12, ignore_eos=True, body_logprob_start_len=0
    )
    tokens = PROMPT + answer["output_ids"]
    meta = answer["meta_info"]
    scaled = log_probs_of(reference, tokens, temperature=0.6)[len(PROMPT) - 1 :]
    assert [entry[0] for entry in meta["output_token_logprobs"]] == pytest.approx(scaled, abs=1e-5)
    unscaled = log_probs_of(reference, PROMPT)
    assert [entry[0] for entry in meta["input_token_logprobs"][1:]] == pytest.approx(unscaled, abs=1e-5)


def test_top_k_is_respected(engine: Engine, reference: Any) -> None:
    answers = engine.generate([PROMPT] * 8, temperature=2.0, top_k=3, max_new_tokens=1, ignore_eos=True)
    with torch.no_grad():
        best = reference(input_ids=torch.tensor([PROMPT])).logits[0, -1].topk(3).indices.tolist()
    assert {answer["output_ids"][0] for answer in answers} <= set(best)


def test_routes_are_the_models(engine: Engine, reference: Any) -> None:
    answer = engine.generate(PROMPT, temperature=1, max_new_tokens=10, ignore_eos=True, body_return_routed_experts=True)
    tokens = torch.tensor([PROMPT + answer["output_ids"][:-1]])
    with torch.no_grad():
        logits = reference(input_ids=tokens, output_router_logits=True).router_logits
    expected = torch.stack([layer.topk(2).indices for layer in logits], 1).numpy()
    assert np.array_equal(routes_of(answer), expected)


def test_logprob_start_len(engine: Engine) -> None:
    answer = engine.generate(PROMPT, temperature=0, max_new_tokens=1, body_logprob_start_len=2)
    entries = answer["meta_info"]["input_token_logprobs"]
    assert entries[0] == [None, PROMPT[2], None]
    assert [entry[1] for entry in entries] == PROMPT[2:]
    assert engine.generate(PROMPT, temperature=0, max_new_tokens=1)["meta_info"]["input_token_logprobs"] == []


def test_lists_are_answered_in_order(engine: Engine) -> None:
    prompts = [PROMPT, PROMPT[:3], [*PROMPT, 11, 12]]
    sampling = [{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for n in (9, 2, 5)]
    answer = engine.send("/generate", {"input_ids": prompts, "sampling_params": sampling, "rid": ["a", "b", "c"]})
    answers = answer.json()
    assert [a["meta_info"]["id"] for a in answers] == ["a", "b", "c"]
    assert [len(a["output_ids"]) for a in answers] == [9, 2, 5]
    for prompt, params, given in zip(prompts, sampling, answers, strict=True):
        assert engine.generate(prompt, **params)["output_ids"] == given["output_ids"]
        assert "output_token_logprobs" not in given["meta_info"]


def test_several_samples_of_each_prompt(engine: Engine) -> None:
    answers = engine.generate([PROMPT, PROMPT[:3]], temperature=1.0, n=2, max_new_tokens=3, ignore_eos=True)
    assert [a["meta_info"]["prompt_tokens"] for a in answers] == [6, 6, 3, 3]
    assert len({a["meta_info"]["id"] for a in answers}) == 4


def test_text_prompts(engine: Engine) -> None:
    body = {"text": "hi", "sampling_params": {"temperature": 0, "max_new_tokens": 3}}
    answer = engine.send("/generate", body).json()
    assert answer["meta_info"]["prompt_tokens"] == 2
    assert len(answer["text"]) == 3


def test_nothing_to_generate(engine: Engine) -> None:
    answer = engine.generate(PROMPT, max_new_tokens=0, body_logprob_start_len=0)
    assert (answer["text"], answer["output_ids"]) == ("", [])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert len(answer["meta_info"]["input_token_logprobs"]) == len(PROMPT)


def test_default_is_128_tokens(engine: Engine) -> None:
    assert len(engine.generate(PROMPT, temperature=0, ignore_eos=True)["output_ids"]) == 128


# Ends


def test_stop_token_is_kept_in_the_ids_and_cut_from_the_text(engine: Engine) -> None:
    greedy = engine.generate(PROMPT, temperature=0, max_new_tokens=8, ignore_eos=True)["output_ids"]
    stop = greedy[-1]
    end = greedy.index(stop) + 1
    answer = engine.generate(PROMPT, temperature=0, max_new_tokens=8, stop_token_ids=[stop])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["output_ids"] == greedy[:end]
    whole = engine.generate(PROMPT, temperature=0, max_new_tokens=8, stop_token_ids=[stop], no_stop_trim=True)
    assert len(whole["text"]) == len(answer["text"]) + 1


def test_ignore_eos_ignores_stop_tokens_too(engine: Engine) -> None:
    greedy = engine.generate(PROMPT, temperature=0, max_new_tokens=4, ignore_eos=True)["output_ids"]
    answer = engine.generate(PROMPT, temperature=0, max_new_tokens=4, stop_token_ids=[greedy[0]], ignore_eos=True)
    assert answer["output_ids"] == greedy


def test_stop_string(engine: Engine) -> None:
    greedy = engine.generate(PROMPT, temperature=0, max_new_tokens=8, ignore_eos=True)
    stop = greedy["text"][1:3]
    answer = engine.generate(PROMPT, temperature=0, max_new_tokens=8, stop=stop, ignore_eos=True)
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    cut = greedy["text"].index(stop)
    assert answer["text"] == greedy["text"][:cut]
    assert len(answer["output_ids"]) == cut + 2


def test_stream(engine: Engine) -> None:
    body = {
        "input_ids": PROMPT, "stream": True, "return_logprob": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True},
    }  # fmt: skip
    lines = [line for line in engine.send("/generate", body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert [len(event["output_ids"]) for event in events] == [1, 2, 3]
    assert [event["meta_info"]["finish_reason"] is None for event in events] == [True, True, False]
    final = events[-1]
    assert len(final["meta_info"]["output_token_logprobs"]) == 3
    assert final["output_ids"] == engine.generate(PROMPT, **body["sampling_params"])["output_ids"]


def test_error_in_a_stream_is_an_event(engine: Engine) -> None:
    body = {"input_ids": PROMPT, "stream": True, "sampling_params": {"temperature": -1}}
    answer = engine.send("/generate", body)
    assert answer.status_code == 200
    event = json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))
    assert event == {
        "error": {
            "message": "temperature must be a non-negative finite number, got -1.",
            "type": "invalid_request_error",
            "code": 400,
            "retryable": False,
        }
    }


# Refusals

SAME_WORDS = [
    ({"sampling_params": {}}, "Either text, input_ids or input_embeds should be provided."),
    ({"input_ids": []}, "input_ids cannot be empty."),
    ({"temperature": -1}, "temperature must be a non-negative finite number, got -1."),
    ({"top_p": 0}, "top_p must be in (0, 1], got 0."),
    ({"top_k": 0}, "top_k must be -1 (disable) or at least 1, got 0."),
    ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1."),
    (
        {"input_ids": [1] * 3000},
        f"The input (3000 tokens) is longer than the model's context length ({CONTEXT} tokens).",
    ),
    (
        {"max_new_tokens": 5000},
        f"Requested token count exceeds the model's maximum context length of {CONTEXT} tokens. You requested a total "
        "of 5006 tokens: 6 tokens from the input messages and 5000 tokens for the completion. Please reduce the number "
        "of tokens in the input messages or the completion to fit within the limit.",
    ),
]


@pytest.mark.parametrize(("given", "message"), SAME_WORDS, ids=lambda value: str(value)[:30])
def test_refusals_in_the_same_words(engine: Engine, given: dict[str, Any], message: str) -> None:
    body = given if {"input_ids", "sampling_params"} & given.keys() else {"input_ids": PROMPT, "sampling_params": given}
    answer = engine.send("/generate", body)
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": message}})


OTHER_WORDS: list[dict[str, Any]] = [
    {"input_ids": "abc"},
    {"input_ids": PROMPT, "sampling_params": "x"},
    {"input_ids": PROMPT, "sampling_params": {"temprature": 1.0}},
    {"input_ids": PROMPT, "sampling_params": {"sampling_seed": "a"}},
    {"input_ids": [PROMPT, PROMPT], "rid": ["a", "a"]},
]


@pytest.mark.parametrize("body", OTHER_WORDS, ids=str)
def test_refusals_in_other_words(engine: Engine, body: dict[str, Any]) -> None:
    assert engine.send("/generate", body).status_code == 400


def test_token_ids_outside_the_vocabulary(engine: Engine) -> None:
    if engine.kind == "sglang":
        pytest.skip("SGLang 0.5.23 has no such check: the scheduler fails in the embedding, and the server ends")
    answer = engine.send("/generate", {"input_ids": [1, 999_999]})
    assert answer.status_code == 400
    assert "token id 999999 is outside the vocabulary" in answer.json()["error"]["message"]


# Abort and pause


def test_abort_returns_what_there_is(engine: Engine) -> None:
    started = engine.start(PROMPT, rid="to-abort", **LONG)
    answer = engine.send("/abort_request", {"rid": "to-abort"})
    assert (answer.status_code, answer.content) == (200, b"")
    final = started.finish()
    reason = final["meta_info"]["finish_reason"]
    assert reason == {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    assert 0 < len(final["output_ids"]) < LONG["max_new_tokens"]
    assert len(final["meta_info"]["output_token_logprobs"]) == len(final["output_ids"])
    assert len(routes_of(final)) == len(PROMPT) + len(final["output_ids"]) - 1


def test_abort_all_and_abort_of_nothing(engine: Engine) -> None:
    started = [engine.start(PROMPT, **LONG) for _ in range(2)]
    assert engine.send("/abort_request", {"rid": "nobody"}).status_code == 200
    assert all(s.running for s in started)
    engine.send("/abort_request", {"abort_all": True})
    assert {s.finish()["meta_info"]["finish_reason"]["type"] for s in started} == {"abort"}


def test_pause_abort_ends_requests_and_holds_new_ones(engine: Engine) -> None:
    started = engine.start(PROMPT, **LONG)
    answer = engine.send("/pause_generation", {"mode": "abort"})
    assert answer.json() == {"message": "Generation paused successfully.", "status": "ok"}
    assert started.finish()["meta_info"]["finish_reason"]["type"] == "abort"
    held: list[Any] = []
    thread = threading.Thread(target=lambda: held.append(engine.generate(PROMPT, max_new_tokens=2, ignore_eos=True)))
    thread.start()
    thread.join(1.0)
    assert thread.is_alive()
    answer = engine.send("/continue_generation", {})
    assert answer.json() == {"message": "Generation continued successfully.", "status": "ok"}
    thread.join(30)
    assert len(held[0]["output_ids"]) == 2


def test_pause_in_place_keeps_requests(engine: Engine) -> None:
    started = engine.start(PROMPT, **LONG)
    engine.send("/pause_generation", {"mode": "in_place"})
    flush = engine.send("/flush_cache", {})
    assert (flush.status_code, flush.text) == (400, "Flush cache failed.\n")
    time.sleep(0.2)
    before = len(started.events)
    time.sleep(0.3)
    assert len(started.events) == before
    engine.send("/continue_generation", {})
    final = started.finish()
    assert len(final["output_ids"]) == LONG["max_new_tokens"]
    assert final["meta_info"]["num_retractions"] == 0


def test_pause_retract_frees_the_cache_and_starts_over_from_the_tokens(engine: Engine) -> None:
    alone = engine.generate(PROMPT, **LONG)["output_ids"]
    started = engine.start(PROMPT, **LONG)
    engine.send("/pause_generation", {"mode": "retract"})
    flush = engine.send("/flush_cache", {})
    assert flush.status_code == 200
    assert flush.text.startswith("Cache flushed.\n")
    engine.send("/continue_generation", {})
    final = started.finish()
    assert final["meta_info"]["num_retractions"] == 1
    assert final["output_ids"] == alone


def test_unknown_pause_mode(engine: Engine) -> None:
    assert engine.send("/pause_generation", {"mode": "sleep"}).status_code == 400
    assert engine.generate(PROMPT, max_new_tokens=1)["output_ids"]


# Weights

PUSH = """
import sys, httpx, torch
from safetensors import safe_open
from miles.sync.wire import Bucket
url, token, model, factor, version, flush = sys.argv[1:]
client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
with safe_open(f"{model}/model.safetensors", "pt") as file:
    named = [(name, file.get_tensor(name) * float(factor)) for name in file.keys()]
assert client.post("/begin_weight_update", json={}).status_code == 200
for part in (named[: len(named) // 2], named[len(named) // 2 :]):
    bucket = Bucket(part)
    body = {"serialized_named_tensors": [bucket.dumps()], "load_format": "flattened_bucket",
            "flush_cache": flush == "flush", "weight_version": version}
    answer = client.post("/update_weights_from_tensor", json=body)
    assert answer.status_code == 200, answer.text
    print(answer.json()["message"])
assert client.post("/end_weight_update", json={}).status_code == 200
"""


def push(engine: Engine, factor: float, version: str, *, flush: bool = True) -> str:
    """Send the model's weights times `factor` from another process; returns the last answer's message."""
    arguments = [engine.url, TOKEN, str(engine.model), str(factor), version, "flush" if flush else "keep"]
    with tempfile.TemporaryFile("w+") as output:
        # Not pipes: torch's shared-memory manager inherits them and lives on with the server.
        command = [sys.executable, "-c", PUSH, *arguments]
        code = subprocess.run(command, stdout=output, stderr=output, timeout=120).returncode
        output.seek(0)
        text = output.read().strip()
    assert code == 0, text
    return text.splitlines()[-1]


def test_weights_arrive_from_another_process(engine: Engine, reference: Any) -> None:
    before = engine.generate(PROMPT, temperature=0, max_new_tokens=5, ignore_eos=True)
    try:
        assert push(engine, 1.5, "7") == "Success Weight version updated to 7."
        after = engine.generate(PROMPT, temperature=0, max_new_tokens=5, ignore_eos=True)
        assert after["meta_info"]["weight_version"] == "7"
        changed = AutoModelForCausalLM.from_pretrained(engine.model, dtype=torch.float32)
        for parameter in changed.parameters():
            parameter.data *= 1.5
        expected = log_probs_of(changed, PROMPT + after["output_ids"])[len(PROMPT) - 1 :]
        assert [e[0] for e in after["meta_info"]["output_token_logprobs"]] == pytest.approx(expected, abs=1e-5)
    finally:
        push(engine, 1.0, "default")
    restored = engine.generate(PROMPT, temperature=0, max_new_tokens=5, ignore_eos=True)
    assert restored["meta_info"]["output_token_logprobs"] == before["meta_info"]["output_token_logprobs"]


def test_weights_change_under_a_paused_request(engine: Engine) -> None:
    started = engine.start(PROMPT, **LONG)
    engine.send("/pause_generation", {"mode": "in_place"})
    try:
        push(engine, 1.5, "in-flight", flush=False)
        engine.send("/continue_generation", {})
        meta = started.finish()["meta_info"]
        first, second = meta["weight_versions"]
        assert (first["version"], first["start"]) == ("default", 0)
        assert first["end"] == second["start"] > 0
        assert (second["version"], second["end"]) == ("in-flight", LONG["max_new_tokens"])
        assert meta["weight_version"] == "in-flight"
    finally:
        push(engine, 1.0, "default")


def test_flushing_under_held_requests_is_refused_after_the_copy(engine: Engine) -> None:
    started = engine.start(PROMPT, **LONG)
    engine.send("/pause_generation", {"mode": "in_place"})
    engine.send("/begin_weight_update", {})
    body = {"serialized_named_tensors": [_bucket({})], "load_format": "flattened_bucket", "flush_cache": True}
    try:
        answer = engine.send("/update_weights_from_tensor", body)
    finally:
        engine.send("/end_weight_update", {})
        engine.send("/abort_request", {"abort_all": True})
        engine.send("/continue_generation", {})
        started.finish()
    assert answer.status_code == 400
    assert answer.json() == {
        "success": False,
        "message": "Weights were updated, but the cache was not flushed because requests are still running or queued. "
        "Retract or finish them, then call /flush_cache.",
    }


def test_an_update_has_a_beginning_and_an_end(engine: Engine) -> None:
    body = {"serialized_named_tensors": [_bucket({})], "load_format": "flattened_bucket"}
    outside = engine.send("/update_weights_from_tensor", body)
    assert outside.status_code == 400
    message = "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
    assert outside.json() == {"success": False, "message": message}
    end = engine.send("/end_weight_update", {})
    message = "no weight-update session is open; call begin_weight_update() first"
    assert (end.status_code, end.json()) == (400, {"success": False, "message": message})
    assert engine.send("/begin_weight_update", {}).json() == {"success": True, "message": "Success"}
    again = engine.send("/begin_weight_update", {})
    message = "a weight-update session is already open; call end_weight_update() first"
    assert (again.status_code, again.json()) == (400, {"success": False, "message": message})
    assert engine.send("/end_weight_update", {}).json() == {"success": True, "message": "Success"}


BUCKETS: list[Any] = []
"""Buckets live as long as the tests: the servers read their memory."""


def _bucket(named: dict[str, torch.Tensor]) -> str:
    from miles.sync.wire import Bucket

    BUCKETS.append(Bucket(list(named.items()) or [("model.norm.weight", torch.ones(128))]))
    return BUCKETS[-1].dumps()


def _update(engine: Engine, named: dict[str, torch.Tensor]) -> Any:
    engine.send("/begin_weight_update", {})
    body = {"serialized_named_tensors": [_bucket(named)], "load_format": "flattened_bucket"}
    answer = engine.send("/update_weights_from_tensor", body)
    engine.send("/end_weight_update", {})
    return answer


def test_unknown_weight_names(engine: Engine) -> None:
    """The one deliberate difference in the weight protocol: SGLang skips unknown names and reports success."""
    answer = _update(engine, {"model.layers.0.mlp.experts.0.gate_prj.weight": torch.zeros(128, 128)})
    if engine.kind == "sglang":
        assert answer.status_code == 200
    else:
        assert answer.status_code == 400
        assert "Did you mean 'model.layers.0.mlp.experts.0.gate_proj.weight'?" in answer.json()["message"]


def test_weights_from_disk(engine: Engine) -> None:
    missing = engine.send("/update_weights_from_disk", {"model_path": "/nonexistent"})
    assert missing.status_code == 400
    assert missing.json()["success"] is False
    assert missing.json()["num_paused_requests"] == 0
    answer = engine.send("/update_weights_from_disk", {"model_path": str(engine.model), "weight_version": "disk"})
    message = "Succeeded to update model weights. Weight version updated to disk."
    assert answer.json() == {"success": True, "message": message, "num_paused_requests": 0}
    assert engine.get("/model_info").json()["weight_version"] == "disk"
    renamed = engine.send("/update_weight_version", {"new_version": "default"})
    message = "Weight version updated to default"
    assert renamed.json() == {"success": True, "message": message, "new_version": "default"}


def test_checksums(engine: Engine) -> None:
    answer = engine.send("/weights_checker", {"action": "checksum"}).json()
    assert (answer["success"], answer["message"]) == (True, "Success.")
    checksums = answer["ranks"][0]["checksums"]
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in checksums.values())
    # SGLang's names are those of its own fused modules.
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert (name in checksums) == (engine.kind == "embedded")
    unknown = engine.send("/weights_checker", {"action": "guess"})
    assert (unknown.status_code, unknown.json()["message"]) == (400, "Unsupported action='guess'")


def test_memory_is_released_and_taken_again(engine: Engine) -> None:
    before = engine.generate(PROMPT, temperature=0, max_new_tokens=5, ignore_eos=True)
    for tags in ({"tags": ["kv_cache"]}, {"tags": ["weights"]}):
        answer = engine.send("/release_memory_occupation", tags)
        assert (answer.status_code, answer.json()) == (200, None)
    assert engine.get("/health", token=None).status_code == 200, "it is asked whenever it sleeps, and lives on"
    for tags in ({"tags": ["weights"]}, {"tags": ["kv_cache"]}):
        answer = engine.send("/resume_memory_occupation", tags)
        assert (answer.status_code, answer.json()) == (200, None)
    push(engine, 1.0, "default")
    after = engine.generate(PROMPT, temperature=0, max_new_tokens=5, ignore_eos=True)
    assert after["meta_info"]["output_token_logprobs"] == before["meta_info"]["output_token_logprobs"]
