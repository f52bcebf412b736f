"""A session with real engines: partial rollouts are the same bits whatever happens to engines and processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded_process import TOKEN, EngineProcess, engine_processes, list_engines, start_engine
from harness import plain
from transformers import AutoModelForCausalLM, PreTrainedModel

from miles.cluster.ports import choose_ports
from miles.config.schema import (
    DataSection,
    EngineSection,
    EvalSection,
    JournalSection,
    ModelSection,
    RlStep,
    RolloutSection,
    TinyTaskStep,
)
from miles.data.sample import FinishReason, Sample
from miles.engines.embedded.weights import CheckpointWeights
from miles.errors import EngineError, EngineLost, Interrupted
from miles.models.tiny import build_tiny_task
from miles.rollout.session import Collected, NeedWeights, RolloutSession, Stopped
from miles.runs.claim import Fence
from miles.runs.paths import RunPaths
from miles.sync.push import WeightSync

ROLLOUT = RolloutSection(
    prompts_per_step=3,
    group_size=3,
    max_response_tokens=24,
    temperature=0.8,
    over_sampling=2.0,
    # An untrained model seldom ends by itself.
    stop_token_ids=list(range(10, 22)),
    max_concurrent_groups=8,
)
STEPS = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("task")
    step = TinyTaskStep(kind="tiny-task", layers=2, hidden_size=64, train_prompts=32, heldout_prompts=8)
    build_tiny_task(step, output, seed=0)
    return output / "model"


@pytest.fixture(scope="module")
def engines(model_dir) -> Iterator[list[EngineProcess]]:
    """Two engines, used by all tests but the one that kills."""
    with engine_processes(model_dir, 2) as started:
        yield started


@pytest.fixture(scope="module")
def weights(model_dir) -> Callable[[int], PreTrainedModel]:
    """The model of each version: every step changes all weights a little."""

    @cache
    def of(version: int) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * version * torch.randn(parameter.shape, generator=generator))
        return model

    return of


class Attempt:
    """One process's part of a stage."""

    def __init__(
        self, root: Path, model: Path, engines_file: Path, weights, section: RolloutSection, chunk: int
    ) -> None:
        paths = RunPaths(root)
        paths.secrets.mkdir(parents=True, exist_ok=True)
        paths.engine_token.write_text(TOKEN)
        step = RlStep(
            kind="rl",
            model=ModelSection(path=str(model)),
            data=DataSection(path=str(model.parent / "train.jsonl")),
            rollout=section,
            engine=EngineSection(return_routed_experts=True),
            eval=EvalSection(
                data=DataSection(path=str(model.parent / "heldout.jsonl")), samples=2, temperature=0.0, max_prompts=5
            ),
            journal=JournalSection(flush_seconds=0.05),
        )
        self.stop = False
        self.session = RolloutSession(
            step,
            paths=paths,
            stage="grpo",
            seed=5,
            engines_file=engines_file,
            fence=Fence(paths, None),
            stop=lambda: self.stop,
        )
        flight = self.session._train_flight
        flight.how = replace(flight.how, chunk_seconds=0.0, shortest_chunk=chunk)
        self._weights = weights
        self._sync = WeightSync(self.session.post, engines=2, dtype=torch.float32, bucket_bytes=10**6, verify=True)
        self.pushes = 0

    def push(self, version: int) -> None:
        stale = self.session.stale_engines(version)
        stats = self._sync.push(CheckpointWeights(self._weights(version))._views.items(), version, stale)
        self.session.weights_pushed(version, stats.reached)
        self.pushes += 1

    def step(self, step: int, on_progress=lambda done, total: None) -> dict[str, Any] | Stopped:
        self.push(step - 1)
        while True:
            match self.session.collect(step, on_progress):
                case Collected(batch=batch):
                    return plain(batch)
                case NeedWeights():
                    self.push(step - 1)
                case stopped:
                    return stopped


@pytest.fixture
def attempt(tmp_path, model_dir, engines, weights):
    """`with attempt("name") as a` opens a session on the run of that name."""

    @contextmanager
    def open_attempt(name: str, *, use: list[EngineProcess] | None = None, chunk: int = 64, **changes):
        list_engines(tmp_path / f"{name}.json", use or engines)
        section = ROLLOUT.model_copy(update=changes)
        opened = Attempt(tmp_path / name, model_dir, tmp_path / f"{name}.json", weights, section, chunk)
        try:
            opened.session.wait_ready()
            yield opened
        finally:
            opened.session.close()

    return open_attempt


@pytest.fixture
def expected(attempt, engines):
    """The batches of an attempt that nothing disturbs, on one engine."""
    with attempt("calm", use=engines[:1]) as calm:
        return [calm.step(step) for step in range(1, STEPS + 1)]


def samples_of(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [sample for batch in batches for group in batch["groups"] for sample in group["samples"]]


def test_partial_rollouts_are_the_same_on_other_engines_in_other_chunks_and_after_a_stop(attempt, expected, weights):
    samples = samples_of(expected)
    assert any(len(set(sample["weight_versions"])) > 1 for sample in samples), "some response spans two steps"
    assert {sample["finish_reason"] for sample in samples} <= {FinishReason.STOP, FinishReason.LENGTH}

    with attempt("chunked", chunk=3, max_concurrent_groups=2) as chunked:
        assert [chunked.step(step) for step in range(1, STEPS + 1)] == expected
        check_against_hugging_face(chunked, weights)

    with attempt("stopped", chunk=2) as first:
        assert first.step(1) == expected[0]
        calls: list[int] = []

        def stop_soon(done: int, total: int) -> None:
            calls.append(done)
            first.stop = len(calls) > 3

        assert first.step(2, stop_soon) == Stopped()
        with pytest.raises(Interrupted, match="stopped during an evaluation"):
            first.session.evaluate(lambda done, total: None)
    with attempt("stopped") as second:
        journal = second.session.journal
        batch, open_step = journal.read_batch(1), journal.read_open(2)
        assert plain(batch) == expected[0]
        assert sum(len(sample.response_tokens) for group in open_step.groups for sample in group.samples) > 0
        second.session.restore(batch, open_step)
        assert second.step(2) == expected[1]
        assert second.step(3) == expected[2]


def check_against_hugging_face(attempt: Attempt, weights) -> None:
    """Log-probabilities are those of the version that sampled the token; routes too where there was one version."""
    for step in range(1, STEPS + 1):
        batch = attempt.session.journal.read_batch(step)
        assert batch is not None
        for sample in [sample for group in batch.groups for sample in group.samples]:
            check_sample(sample, weights)


def check_sample(sample: Sample, weights) -> None:
    tokens = torch.tensor([sample.tokens])
    for version in set(sample.weight_versions):
        with torch.no_grad():
            output = weights(version)(tokens, output_router_logits=True)
        log_probs = (output.logits[0, :-1] / 0.8).log_softmax(-1)
        taken = log_probs.gather(1, tokens[0, 1:, None])[:, 0][len(sample.prompt.tokens) - 1 :]
        chosen = torch.tensor(sample.weight_versions) == version
        assert torch.allclose(taken[chosen], torch.tensor(sample.log_probs)[chosen], atol=1e-5)
        if chosen.all():
            routes = torch.stack([layer[:-1].topk(2).indices for layer in output.router_logits], dim=1)
            assert sample.routed_experts is not None
            assert np.array_equal(np.sort(sample.routed_experts), routes.sort().values.numpy())


def test_an_engine_killed_in_the_middle_is_replaced(tmp_path, attempt, expected, model_dir):
    ports = choose_ports(2, seed=os.getpid() + 1)
    first = start_engine(model_dir, ports[0])
    started = [first]
    threads: list[threading.Thread] = []
    calls: list[int] = []

    def replace_engine() -> None:
        started[1].wait_ready()
        list_engines(tmp_path / "killed.json", [started[1]], starts=[2])

    def kill(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > 3 and len(started) == 1:
            first.kill()
            started.append(start_engine(model_dir, ports[1]))
            threads.append(threading.Thread(target=replace_engine))
            threads[0].start()

    try:
        first.wait_ready()
        with attempt("killed", use=[first], chunk=2) as run:
            assert run.step(1) == expected[0]
            assert run.step(2, kill) == expected[1]
            assert run.pushes == 3
            with pytest.raises(EngineLost, match="no engine with current weights"):
                assert run.session.stale_engines(2) == [0]
                run.session.evaluate(lambda done, total: None)
            assert run.step(3) == expected[2]
            started[1].kill()
            assert isinstance(run.session.post("/flush_cache", [{}], [0])[0], EngineLost)
    finally:
        for engine in started:
            engine.kill()
        for thread in threads:
            thread.join()


def test_evaluation_is_greedy_and_a_prompt_that_is_too_long_stops_it(attempt):
    with attempt("evaluated") as run:
        run.push(0)
        progress: list[tuple[int, int]] = []
        result = run.session.evaluate(lambda done, total: progress.append((done, total)))
        assert progress[-1] == (5, 5)
        for group in result.groups:
            first, second = group.samples
            assert first.response_tokens == second.response_tokens
            assert set(first.weight_versions) == {0}
        prompts = run.session._inputs.heldout
        prompts[1] = replace(prompts[1], tokens=[7] * 500)
        with pytest.raises(EngineError, match=r"answered 400: .*model's context length"):
            run.session.evaluate(lambda done, total: None)
