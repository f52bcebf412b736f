"""How far a trainer backend is from plain Hugging Face, measured on one layout of ranks after another.

Used by the backends' tests and by `benchmarks/agreement.py`. Speaks only the `TrainerBackend` protocol. Gradients
are read off an AdamW step whose epsilon and learning rate are both `PROBE`: with |g| far below it, w' = w - g.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from miles.config.schema import Backend, Dtype, TrainSection
from miles.training.backend import TokenOutputs, TrainerBackend

PROBE = 1e6


@dataclass(frozen=True)
class Case:
    """A model on a number of ranks, divided in some way."""

    model: str
    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    micro_batches: int = 2
    recompute: bool = False
    balance: float = 0.0
    """Coefficient of the routers' balancing loss; defined for one micro-batch on one data-parallel rank."""
    backend: Backend = Backend.MEGATRON
    dtype: Dtype = Dtype.FLOAT32
    device: Literal["cpu", "cuda"] = "cpu"
    """On `cuda`, each process takes a GPU and speaks NCCL."""

    def __str__(self) -> str:
        data = self.ranks // (self.tensor * self.pipeline)
        sizes = {"tp": self.tensor, "pp": self.pipeline, "ep": self.expert, "dp": data}
        layout = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["1 rank"]
        extras = ["recompute"] * self.recompute + ["balance"] * (self.balance > 0)
        extras += ["bfloat16"] * (self.dtype is Dtype.BFLOAT16)
        return " ".join([self.model, *layout, f"{self.micro_batches} micro-batches", *extras])

    @property
    def expected_file(self) -> str:
        return f"{self.model} {self.balance}.pt"

    def section(self, **changes: Any) -> TrainSection:
        values: dict[str, Any] = {
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor,
            "pipeline_parallel_size": self.pipeline,
            "expert_parallel_size": self.expert,
            "recompute": self.recompute,
            "moe_aux_loss_coef": self.balance,
            "adam_beta1": reference.BETAS[0],
            "adam_beta2": reference.BETAS[1],
            "adam_eps": reference.ADAM_EPS,
            "clip_grad": reference.CLIP_GRAD,
            "log_prob_chunk_tokens": 16,
        }
        return TrainSection(**values | changes)


@dataclass(frozen=True)
class Agreement:
    """max |difference| to Hugging Face in float32; `grad_norm` is relative. All over all ranks."""

    log_probs: float
    entropy: float
    loss: float
    metrics: float
    gradients: float
    grad_norm: float
    updated_weights: float
    """After each of two clipped AdamW steps."""
    exported_weights: float
    """`named_weights` of a fresh backend against the checkpoint's file."""
    saved_weights: float
    """`save_hf` after the steps against `named_weights`."""


def measure(case: Case, model_dir: Path, expected: reference.Reference, scratch: Path) -> Agreement:
    """Run in every rank; the default process group has `case.ranks` of them."""
    rows = reference.sequences()
    probe = build(case, model_dir, adam_eps=PROBE, clip_grad=0.0)
    share = (probe.layout.data_parallel_rank, probe.layout.data_parallel_size)
    batches = reference.micro_batches(rows, case.micro_batches, *share)
    outputs = [
        difference
        for batch, found in zip(batches, probe.log_probs(batches, reference.TEMPERATURE), strict=True)
        for difference in output_differences(batch.indices, batch.lengths, found, expected)
    ]
    before = weights(probe)
    stats = probe.update(batches, reference.loss, lr=PROBE, temperature=reference.TEMPERATURE)
    after = weights(probe)
    gradients = {name: before[name] - after[name] for name in before}

    trained = build(case, model_dir)
    updated = []
    for step in range(2):
        trained.update(batches, reference.loss, lr=reference.LR, temperature=reference.TEMPERATURE)
        updated.append(reference.largest_difference(weights(trained), expected.updated[step])[0])
    trained.save_hf(scratch)
    return Agreement(
        log_probs=max(log_probs for log_probs, _ in outputs),
        entropy=max(entropy for _, entropy in outputs),
        loss=abs(stats.loss - expected.loss),
        metrics=max(abs(stats.metrics[name] - value) for name, value in expected.metrics.items()),
        gradients=reference.largest_difference(gradients, expected.gradients)[0],
        grad_norm=abs(stats.grad_norm / expected.grad_norm - 1),
        updated_weights=max(updated),
        exported_weights=reference.largest_difference(before, stored(model_dir, before))[0],
        saved_weights=reference.largest_difference(weights(trained), stored(scratch, before))[0],
    )


def build(case: Case, model_dir: Path, **changes: Any) -> TrainerBackend:
    if case.backend is Backend.MEGATRON:
        from miles.training.megatron.backend import MegatronBackend

        return MegatronBackend(model_dir, case.section(**changes), seed=0)
    from miles.training.fsdp.backend import FsdpBackend

    return FsdpBackend(model_dir, case.section(**changes), seed=0)


def stored(model_dir: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model's file, rounded to the dtypes of `like`."""
    return {name: value.to(like[name].dtype) for name, value in load_file(model_dir / "model.safetensors").items()}


def weights(backend: TrainerBackend) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in backend.named_weights()}


def output_differences(
    indices: list[int], lengths: list[int], found: TokenOutputs, expected: reference.Reference
) -> Iterator[tuple[float, float]]:
    """Of log-probabilities and entropy, for each sequence."""
    parts = zip(found.log_probs.cpu().split(lengths), found.entropy.cpu().split(lengths), strict=True)
    for index, (log_probs, entropy) in zip(indices, parts, strict=True):
        wanted = expected.outputs[index]
        yield float((log_probs - wanted.log_probs).abs().max()), float((entropy - wanted.entropy).abs().max())


def run_cases(cases: list[Case], root: Path) -> dict[Case, Agreement]:
    """Measure all cases in fresh processes, started once. The saved models stay under `root`."""
    for case in {case.expected_file: case for case in cases}.values():
        model_dir = reference.build_model(case.model, root / case.model)
        expected = reference.hugging_face(model_dir, reference.sequences(), case.balance)
        torch.save(expected, root / case.expected_file)
    processes = max(case.ranks for case in cases)
    mp.start_processes(_process_main, (processes, cases, str(root)), nprocs=processes, start_method="spawn")
    parts = [torch.load(_results(root, process), weights_only=False) for process in range(processes)]
    return {case: _worst([part[case] for part in parts if case in part]) for case in cases}


def saved_model(root: Path, case: Case) -> Path:
    """Where `run_cases` left the model that the case saved."""
    return root / f"saved {case}"


def _process_main(process: int, processes: int, cases: list[Case], root: str) -> None:
    """Take part in the cases in turn. Those with few ranks go round the processes."""
    torch.set_num_threads(1)
    directory = Path(root)
    results = {}
    for number, case in enumerate(cases):
        rank = process - number % (processes // case.ranks) * case.ranks
        if not 0 <= rank < case.ranks:
            continue
        enter_process_group(case, rank, process, f"file://{root}/rendezvous-{number}")
        expected = torch.load(directory / case.expected_file, weights_only=False)
        results[case] = measure(case, directory / case.model, expected, saved_model(directory, case))
        leave_process_group()
    torch.save(results, _results(directory, process))


def enter_process_group(case: Case, rank: int, process: int, rendezvous: str) -> None:
    if case.device == "cuda":
        # Always the same GPU for a process: Transformer Engine keeps its streams from case to case.
        os.environ["LOCAL_RANK"] = str(process)
        torch.cuda.set_device(process)
    backend = "gloo" if case.device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=case.ranks)


def leave_process_group() -> None:
    """End the default process group and what megatron-core keeps of it."""
    megatron = sys.modules.get("megatron.core")
    if megatron is not None:  # importing it takes seconds, and only its own cases have done so
        megatron.parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _results(root: Path, process: int) -> Path:
    return root / f"results-{process}.pt"


def _worst(parts: list[Agreement]) -> Agreement:
    return Agreement(**{field.name: max(getattr(part, field.name) for part in parts) for field in fields(Agreement)})
