"""A Hugging Face causal language model from packed micro-batches to token outputs, sharded with FSDP2.

Owns construction (weights read once, by rank 0), sharding, the forward pass and the export under checkpoint
names. The optimizer belongs to `miles.training.fsdp.backend`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from miles.config.schema import TrainSection
from miles.data.batch import MicroBatch
from miles.errors import ConfigError, DataError
from miles.training.fsdp.attention import PACKED_ATTENTION
from miles.training.fsdp.router import load_balancing_loss
from miles.training.token_outputs import token_outputs

_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class PolicyModel(nn.Module):
    """The root of the FSDP modules: its forward pass ends in token outputs, so whole logits never exist."""

    def __init__(self, causal_lm: PreTrainedModel, *, chunk_tokens: int, router_loss: bool) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._chunk_tokens = chunk_tokens
        self._router_loss = router_loss

    def forward(self, micro_batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropy as in `TokenOutputs`, and the router's balancing loss (or 0).

        A tuple of tensors, because FSDP hangs its backward hooks on the tensors that it finds in the output.
        """
        decoded = self.causal_lm.base_model(
            input_ids=micro_batch.tokens[None],
            position_ids=micro_batch.position_ids[None],
            cu_seq_lens_q=micro_batch.cu_seqlens,
            cu_seq_lens_k=micro_batch.cu_seqlens,
            max_length_q=micro_batch.max_length,
            max_length_k=micro_batch.max_length,
            use_cache=False,
            **({"output_router_logits": True} if self._router_loss else {}),
        )
        outputs = token_outputs(
            decoded.last_hidden_state[0],
            self.causal_lm.get_output_embeddings().weight,
            micro_batch,
            temperature=temperature,
            chunk_tokens=self._chunk_tokens,
        )
        balance = outputs.log_probs.new_zeros(())
        if self._router_loss:
            balance = load_balancing_loss(decoded.router_logits, self.causal_lm.config.num_experts_per_tok)
        return outputs.log_probs, outputs.entropy, balance


class ShardedPolicyModel(PolicyModel, FSDPModule):
    """What `fully_shard` makes of a `PolicyModel`; only a type for checkers."""


def build_policy_model(
    model_dir: Path, train: TrainSection, mesh: DeviceMesh, *, trust_remote_code: bool
) -> ShardedPolicyModel:
    """The model of a Hugging Face directory with float32 parameters, divided over the ranks of `mesh`.

    Rank 0 reads the weights and deals out each parameter's shards, so that the others never hold a whole
    model. Collective.
    """
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    _reject_unsupported(config, train)
    source = _read(model_dir, trust_remote_code) if mesh.get_rank() == 0 else None
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=PACKED_ATTENTION,
            trust_remote_code=trust_remote_code,
        )
    # Evaluation mode for good: dropout would make the ratio of an unchanged policy differ from 1.
    causal_lm.eval()
    model = PolicyModel(causal_lm, chunk_tokens=train.log_prob_chunk_tokens, router_loss=train.moe_aux_loss_coef > 0)
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, train.dtype), reduce_dtype=torch.float32)
    for layer in _decoder_layers(causal_lm):
        if train.recompute:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    sharded = cast(ShardedPolicyModel, model)
    sharded.to_empty(device=mesh.device_type)
    _sum_gradients(sharded)
    _deal_out(sharded.causal_lm, source, mesh)
    return sharded


def checkpoint_weights(model: ShardedPolicyModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters in `dtype` under checkpoint names, a layer at a time; tied ones once. Collective."""
    causal_lm = model.causal_lm
    for _, layer in groupby(causal_lm.named_parameters(), key=lambda item: _layer_of(item[0])):
        whole = {name: cast(DTensor, value.detach().to(dtype)).full_tensor() for name, value in layer}
        yield from revert_weight_conversion(causal_lm, whole).items()


def _decoder_layers(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The blocks that transformers says must stay in one piece: `layers` of most decoders, `h` of GPT-2's."""
    whole = causal_lm._no_split_modules or ()
    layers = [module for module in causal_lm.base_model.modules() if type(module).__name__ in whole]
    if not layers:
        raise DataError(
            f"{type(causal_lm).__name__} names no layers (_no_split_modules), by which FSDP would divide it",
            fix="choose another model",
        )
    return layers


def _layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp...`; the name itself where there is no number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _reject_unsupported(config: PretrainedConfig, train: TrainSection) -> None:
    """Refuse what would train without an error on other numbers than the model's own."""
    for name in _LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1.0):
            raise DataError(
                f"{config.model_type} transforms its logits ({name} = {getattr(config, name)}); "
                "the fsdp backend does not",
                fix="choose another model",
            )
    mixers = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if mixers:
        raise DataError(
            f"{config.model_type} has layers of type {sorted(mixers)}, which would mix packed sequences",
            fix="choose a model with attention layers only",
        )
    if train.moe_aux_loss_coef > 0 and not hasattr(config, "num_experts_per_tok"):
        raise ConfigError(
            f"train.moe_aux_loss_coef = {train.moe_aux_loss_coef}, but {config.model_type} has no experts",
            fix="set train.moe_aux_loss_coef = 0",
        )


def _read(model_dir: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the CPU in float32; DataError where the directory lacks weights."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise DataError(
            f"{model_dir} lacks {len(missing)} weights of {type(model).__name__}, the first is {missing[0]}",
            fix="check that the download is complete and that config.json belongs to these weights",
        )
    return cast(PreTrainedModel, model)


def _deal_out(model: PreTrainedModel, source: PreTrainedModel | None, mesh: DeviceMesh) -> None:
    """Copy rank 0's parameters into everybody's shards, and its buffers (rotary frequencies) to everybody."""
    device = torch.device(mesh.device_type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shard = cast(DTensor, parameter)
            whole = torch.empty(shard.shape, device=device) if source is None else source.get_parameter(name)
            shard.copy_(distribute_tensor(whole.detach().to(device), mesh, shard.placements))
        for name, buffer in model.named_buffers():
            if source is not None:
                buffer.copy_(source.get_buffer(name))
            dist.broadcast(buffer, src=0)


def _sum_gradients(model: ShardedPolicyModel) -> None:
    """Add gradients over ranks, where FSDP's default is the mean: loss weights are global already."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
