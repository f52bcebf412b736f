"""A Hugging Face causal language model made ready for ragged batches: loading, and one forward pass.

Owns the model and its KV cache. Which requests take part in a pass belongs to `scheduler`; changing weights to
`weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from miles.engines.embedded import attention, experts
from miles.engines.embedded.attention import Segment, SlotCache, plan_attention
from miles.engines.embedded.rounding import row_multiple
from miles.errors import EngineError


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one forward pass computed."""

    logits: torch.Tensor
    """[number of asked rows, V]"""
    routes: torch.Tensor | None
    """int32 [T, layers, top_k] of a mixture-of-experts model, zero in its dense layers"""


class Runner:
    """The model with its cache. Not thread-safe: one thread calls it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.cache = SlotCache()
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        heads = self.config.num_attention_heads
        self._repeat = heads // (getattr(self.config, "num_key_value_heads", None) or heads)
        self._routes: dict[int, torch.Tensor] = {}
        self.has_routes = False
        for name, module in model.named_modules():
            if experts.is_experts(module):
                self.has_routes = True
                module.register_forward_pre_hook(self._recorder(_layer_of(name)))

    def _recorder(self, layer: int) -> Any:
        def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._routes[layer] = args[1]

        return record

    @torch.no_grad()
    def forward(self, tokens: Sequence[int], segments: Sequence[Segment], asked: Sequence[int]) -> PassResult:
        """Run `tokens` (those of `segments`, packed) and return the logits that follow each token index in `asked`."""
        plan = plan_attention(segments, self.cache, self._repeat)
        total = len(tokens)
        multiple = row_multiple()
        padding = -total % multiple
        last = asked[-1] if asked else total - 1
        kept = [*asked, *[last] * (-len(asked) % multiple)] or [last]
        output = self.model(
            input_ids=torch.tensor([[*tokens, *[0] * padding]]),
            position_ids=torch.cat([plan.positions, torch.zeros(padding, dtype=torch.long)])[None],
            use_cache=False,
            logits_to_keep=torch.tensor(kept),
            plan=plan,
        )
        routes = self._collect_routes(total) if self.has_routes else None
        return PassResult(logits=output.logits[0, : len(asked)], routes=routes)

    def _collect_routes(self, total: int) -> torch.Tensor:
        top_k = max(indices.shape[-1] for indices in self._routes.values())
        routes = torch.zeros(total, self.config.num_hidden_layers, top_k, dtype=torch.int32)
        for layer, indices in self._routes.items():
            routes[:, layer] = indices[:total].to(torch.int32)
        self._routes.clear()
        return routes


def _layer_of(name: str) -> int:
    """Index in `model.layers.3.mlp.experts`."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def load_runner(directory: Path, dtype: torch.dtype | Literal["auto"], *, trust_remote_code: bool = False) -> Runner:
    """Open a model directory; EngineError when it is broken or the engine cannot run such a model."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        _refuse_recurrent(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(
            f"cannot load the model {directory}: {reason}",
            fix="point model.path to a Hugging Face directory that AutoModelForCausalLM opens",
        ) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise EngineError(
            f"{directory} has no weight {missing[0]!r}, which its config.json calls for ({len(missing)} are missing)",
            fix="the directory is incomplete or its config.json belongs to another model",
        )
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        # Own memory, so that releasing and updating weights never touches a file's mapping.
        parameter.data = parameter.data.clone()
    if any(experts.is_experts(module) for module in model.modules()):
        model.set_experts_implementation(experts.NAME)
    runner = Runner(model)
    _check_against_plain_forward(runner, directory)
    return runner


def _refuse_recurrent(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise EngineError(
            f"the embedded engine cannot run {config.model_type!r}: layers of type {', '.join(sorted(kinds))} keep a "
            "state that is not a key-value cache",
            fix='use engine.kind = "sglang"',
        )


@torch.no_grad()
def _check_against_plain_forward(runner: Runner, directory: Path) -> None:
    """Refuse a model whose packed, cached passes differ from its own plain forward pass."""
    tokens = [t % runner.vocabulary for t in (5, 11, 3, 17, 2, 7, 13, 1, 19)]
    runner.forward(tokens[:3], [Segment(1, 0, 3)], [])
    mixed = runner.forward([*tokens[:5], *tokens[3:]], [Segment(0, 0, 5), Segment(1, 3, 6)], [4, 10])
    runner.cache.release()
    model = runner.model
    model.set_attn_implementation("eager")
    plain = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    model.set_attn_implementation(attention.NAME)
    runner._routes.clear()
    tolerance = 1e-3 if plain.dtype == torch.float32 else 0.1
    difference = (mixed.logits - plain[[4, 8]]).float().abs().max()
    bound = tolerance * max(1.0, float(plain.float().abs().max()))
    if not difference <= bound:
        raise EngineError(
            f"the embedded engine computes other logits than the model in {directory} itself "
            f"(largest difference {float(difference):.2g}, allowed {bound:.2g})",
            fix='use engine.kind = "sglang"',
        )
