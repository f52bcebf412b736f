"""The megatron backend in one process: what does not depend on the layout. The layouts are in test_megatron_layouts."""

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from layouts import PROBE, Case, leave_process_group, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles.config.schema import Dtype
from miles.data.batch import MicroBatch, Sequence, pack
from miles.errors import ConfigError, DataError, TrainerError
from miles.training.backend import LossOutput, TokenOutputs, UpdateStats
from miles.training.fsdp.router import load_balancing_loss
from miles.training.megatron.backend import MegatronBackend, model_inputs


@contextmanager
def one_rank() -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        leave_process_group()


def build(model_dir: Path, **changes: Any) -> MegatronBackend:
    return MegatronBackend(model_dir, Case("").section(**changes), seed=0)


def update(backend: MegatronBackend, micro_batches: list[MicroBatch], lr: float = reference.LR) -> UpdateStats:
    return backend.update(micro_batches, reference.loss, lr=lr, temperature=reference.TEMPERATURE)


def zero_loss(outputs: TokenOutputs, micro_batch: MicroBatch) -> LossOutput:
    return LossOutput(loss=0.0 * outputs.log_probs.sum(), metrics={})


def test_log_probs_before_an_update_are_those_within_it(tmp_path: Path) -> None:
    """The ratio of the first update is 1 to the last bit."""
    seen: list[torch.Tensor] = []

    def remember(outputs: TokenOutputs, micro_batch: MicroBatch) -> LossOutput:
        seen.append(outputs.log_probs.detach())
        return reference.loss(outputs, micro_batch)

    batches = reference.micro_batches(reference.sequences(), 2)
    with one_rank():
        backend = build(reference.build_model("qwen3-moe", tmp_path))
        before = backend.log_probs(batches, reference.TEMPERATURE)
        backend.update(batches, remember, lr=0.1, temperature=reference.TEMPERATURE)
    assert all(torch.equal(out.log_probs, within) for out, within in zip(before, seen, strict=True))
    assert not before[0].log_probs.requires_grad


def test_a_dummy_micro_batch_changes_nothing(tmp_path: Path) -> None:
    model_dir = reference.build_model("qwen3-moe", tmp_path)
    rows = reference.sequences()
    [batch] = reference.micro_batches(rows, 1)
    nothing = Sequence(torch.tensor([1, 2]), torch.zeros(2), torch.zeros(2), {"advantages": torch.zeros(2)})
    dummy = replace(pack([nothing], [0]), indices=[-1])
    with one_rank():
        alone, accompanied = build(model_dir), build(model_dir)
        assert update(alone, [batch]) == update(accompanied, [batch, dummy])
        assert reference.largest_difference(weights(alone), weights(accompanied))[0] == 0.0


def test_a_sequence_of_one_token_is_harmless(tmp_path: Path) -> None:
    row = Sequence(torch.tensor([5]), torch.zeros(1), torch.zeros(1), {"advantages": torch.zeros(1)})
    with one_rank():
        stats = update(build(reference.build_model("qwen3", tmp_path)), [pack([row], [0])])
    assert (stats.loss, stats.grad_norm) == (0.0, 0.0)


def test_bfloat16(tmp_path: Path) -> None:
    """Measured: log-probabilities mean 0.02 from float32, gradient norm 1 %."""
    model_dir = reference.build_model("qwen3-moe", tmp_path)
    rows = reference.sequences()
    wanted = reference.hugging_face(model_dir, rows)
    batch = pack(rows, list(range(len(rows))))
    with one_rank():
        backend = build(model_dir, dtype=Dtype.BFLOAT16)
        exported = weights(backend)
        [outputs] = backend.log_probs([batch], reference.TEMPERATURE)
        stats = update(backend, [batch])
        moved = weights(backend)
    difference = outputs.log_probs - torch.cat([out.log_probs for out in wanted.outputs])
    assert outputs.log_probs.dtype == torch.float32
    assert 1e-4 < difference.abs().mean() < 0.1
    assert stats.grad_norm == pytest.approx(wanted.grad_norm, rel=0.1)
    stored = {name: value.bfloat16() for name, value in load_file(model_dir / "model.safetensors").items()}
    assert reference.largest_difference(exported, stored)[0] == 0.0
    assert all(value.dtype == torch.bfloat16 and not torch.equal(value, stored[name]) for name, value in moved.items())


def test_router_loss_is_the_token_weighted_mean_over_micro_batches(tmp_path: Path) -> None:
    model_dir = reference.build_model("qwen3-moe", tmp_path)
    rows = reference.sequences()
    batches = reference.micro_batches(rows, 2)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    total = sum(len(row) for row in rows)
    for batch in batches:
        routed = [model(rows[i].tokens[None], output_router_logits=True).router_logits for i in batch.indices]
        layers = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
        (0.3 * len(batch.tokens) / total * load_balancing_loss(layers, 2)).backward()
    named = ((n, p.grad if p.grad is not None else torch.zeros_like(p)) for n, p in model.named_parameters())
    wanted = dict(reference.checkpoint_tensors(named))
    with one_rank():
        backend = build(model_dir, moe_aux_loss_coef=0.3, adam_eps=PROBE, clip_grad=0.0)
        before = weights(backend)
        stats = backend.update(batches, zero_loss, lr=PROBE, temperature=1.0)
        after = weights(backend)
    found = {name: before[name] - after[name] for name in before}
    assert max(float(value.abs().max()) for value in wanted.values()) > 1e-3
    assert reference.largest_difference(found, wanted)[0] < 1e-6
    assert stats.loss == 0.0


def test_weight_decay_spares_vectors(tmp_path: Path) -> None:
    with one_rank():
        backend = build(reference.build_model("qwen3", tmp_path), weight_decay=0.5)
        before = weights(backend)
        backend.update(reference.micro_batches(reference.sequences(), 1), zero_loss, lr=0.1, temperature=1.0)
        after = weights(backend)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value * (0.95 if value.ndim > 1 else 1.0))


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tmp_path: Path) -> None:
    def broken(outputs: TokenOutputs, micro_batch: MicroBatch) -> LossOutput:
        return LossOutput(loss=math.nan * outputs.log_probs.sum(), metrics={})

    batches = reference.micro_batches(reference.sequences(), 1)
    with one_rank():
        backend = build(reference.build_model("qwen3", tmp_path))
        before = weights(backend)
        with pytest.raises(TrainerError, match="norm is nan"):
            backend.update(batches, broken, lr=0.1, temperature=1.0)
        assert reference.largest_difference(before, weights(backend))[0] == 0.0
        assert update(backend, batches).grad_norm > 0


def test_a_second_backend_is_a_reference_model(tmp_path: Path) -> None:
    """Updating one leaves the other, in the same process, as it was."""
    model_dir = reference.build_model("qwen3", tmp_path)
    batches = reference.micro_batches(reference.sequences(), 1)
    with one_rank():
        frozen, trained = build(model_dir), build(model_dir)
        before = frozen.log_probs(batches, 1.0)[0].log_probs
        update(trained, batches)
        assert torch.equal(frozen.log_probs(batches, 1.0)[0].log_probs, before)
        assert not torch.equal(trained.log_probs(batches, 1.0)[0].log_probs, before)


def test_megatron_on_a_cpu_leaves_no_trace(tmp_path: Path) -> None:
    names = ("current_device", "Stream", "current_stream", "synchronize", "stream")
    before = [getattr(torch.cuda, name) for name in names]
    with one_rank():
        update(build(reference.build_model("qwen3", tmp_path)), reference.micro_batches(reference.sequences(), 1))
    assert [getattr(torch.cuda, name) for name in names] == before
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_router_loss_without_experts_is_refused(tmp_path: Path) -> None:
    with one_rank(), pytest.raises(ConfigError, match="has no experts"):
        build(reference.build_model("qwen3", tmp_path), moe_aux_loss_coef=0.1)


def test_unsupported_rotary_embeddings_are_refused(tmp_path: Path) -> None:
    model_dir = reference.build_model("llama", tmp_path)
    config = (model_dir / "config.json").read_text()
    (model_dir / "config.json").write_text(config.replace('"llama3"', '"dynamic"'))
    with one_rank(), pytest.raises(DataError, match="rope_type 'dynamic'"):
        build(model_dir)


def test_padding_for_sequence_parallelism_is_a_sequence_of_its_own() -> None:
    batch = pack(reference.sequences(), [0, 4])
    inputs = model_inputs(batch, 4)
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert inputs["packed_seq_params"].cu_seqlens_q.tolist() == [0, 3, 5, 8]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert inputs["packed_seq_params"].max_seqlen_q == 3
    assert model_inputs(batch, 5)["input_ids"].shape == (1, 5)
