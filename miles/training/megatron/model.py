"""The megatron-core model of a Hugging Face config: `TransformerConfig`, modules, rotary frequencies.

Owns the construction only. Weights come from `miles.training.megatron.weights`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from miles.config.schema import TrainSection
from miles.errors import DataError
from miles.models.mapping import Geometry, padded_vocab_size
from miles.training.megatron.layout import EXPERT_TENSOR_PARALLEL_SIZE, Grid
from miles.training.megatron.modules import PackedAttention, RMSNorm


class HiddenStatesModel(GPTModel):
    """A GPTModel whose last stage returns the hidden states of all tokens [T, 1, H] instead of logits."""

    def _postprocess(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        if not (self.post_process and self.config.sequence_parallel):
            return hidden_states
        # The output layer sums the gradient over its vocabulary shards; each rank keeps its own rows of it.
        return gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)

    @property
    def output_weight(self) -> torch.Tensor:
        """The output embedding's rows on this rank [V_local, H]; on the last stage."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight


def uses_transformer_engine(device: torch.device, dtype: torch.dtype) -> bool:
    """Its kernels for packed attention exist on GPUs and in half precision only."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    return device.type == "cuda" and dtype != torch.float32 and installed


def build_model(
    hf_config: Any,
    geometry: Geometry,
    train: TrainSection,
    grid: Grid,
    device: torch.device,
    dtype: torch.dtype,
) -> HiddenStatesModel:
    """This rank's part of the model on `device`, with uninitialized weights."""
    fused = uses_transformer_engine(device, dtype)
    config = transformer_config(geometry, train, device, dtype, fused)
    model = HiddenStatesModel(
        config,
        _block_spec(geometry, grid, fused),
        vocab_size=padded_vocab_size(geometry.vocab_size, grid.tensor.size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=grid.first_stage,
        post_process=grid.last_stage,
        share_embeddings_and_output_weights=geometry.tied,
        position_embedding_type="rope",
    )
    model.rotary_pos_emb.inv_freq = inverse_frequencies(hf_config, geometry.head_dim)
    return model.to(device)


def transformer_config(
    geometry: Geometry, train: TrainSection, device: torch.device, dtype: torch.dtype, fused: bool
) -> TransformerConfig:
    """The `TransformerConfig` of a geometry under `train`'s parallel sizes."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=geometry.layers,
        hidden_size=geometry.hidden_size,
        num_attention_heads=geometry.heads,
        num_query_groups=geometry.kv_heads,
        kv_channels=geometry.head_dim,
        ffn_hidden_size=geometry.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=geometry.norm_eps,
        qk_layernorm=geometry.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=geometry.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        # Every weight is read from the checkpoint.
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=train.tensor_parallel_size,
        pipeline_model_parallel_size=train.pipeline_parallel_size,
        expert_model_parallel_size=train.expert_parallel_size,
        expert_tensor_parallel_size=EXPERT_TENSOR_PARALLEL_SIZE,
        sequence_parallel=train.tensor_parallel_size > 1,
        # Packed micro-batches differ in length; pipeline stages tell each other the shape.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # Gradients are summed over micro-batches and ranks, not averaged: the loss weights are global.
        calculate_per_token_loss=True,
        **(recompute if train.recompute else {}),
        **(_moe_arguments(geometry, train, dtype, fused) if geometry.experts else {}),
    )


def _moe_arguments(geometry: Geometry, train: TrainSection, dtype: torch.dtype, fused: bool) -> dict[str, Any]:
    return {
        "num_moe_experts": geometry.experts,
        "moe_layer_freq": [int(sparse) for sparse in geometry.sparse_layers],
        "moe_ffn_hidden_size": geometry.moe_intermediate_size,
        "moe_router_topk": geometry.experts_per_token,
        # Softmax over the chosen experts equals softmax over all, chosen and normalized to sum 1.
        "moe_router_pre_softmax": not geometry.normalize_expert_weights,
        # Transformer Engine would round a float32 router's inputs to TF32, and a rounding can choose another expert.
        "moe_router_dtype": "fp64" if dtype is torch.float32 else "fp32",
        "moe_router_load_balancing_type": "aux_loss" if train.moe_aux_loss_coef else "none",
        "moe_aux_loss_coeff": train.moe_aux_loss_coef,
        "moe_grouped_gemm": fused,
    }


def _block_spec(geometry: Geometry, grid: Grid, fused: bool) -> TransformerBlockSubmodules:
    """The modules of this stage's layers."""
    count = geometry.layers // grid.pipeline.size
    first = grid.pipeline.rank * count
    experts = [geometry.experts if sparse else None for sparse in geometry.sparse_layers[first : first + count]]
    if fused:
        from megatron.core.extensions.transformer_engine import TENorm

        layers = [
            get_gpt_layer_with_transformer_engine_spec(
                num_experts=number, moe_grouped_gemm=True, qk_layernorm=geometry.qk_norm
            )
            for number in experts
        ]
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(
        layer_specs=[_local_layer(geometry, number) for number in experts], layer_norm=RMSNorm
    )


def _local_layer(geometry: Geometry, experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=geometry.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if geometry.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def inverse_frequencies(hf_config: Any, head_dim: int) -> torch.Tensor:
    """Rotary frequencies [head_dim / 2] of a config, as transformers computes them; float32 on the CPU."""
    rope = hf_config.rope_parameters
    kind = rope["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (rope["rope_theta"] ** exponents)
    if kind not in ("linear", "llama3"):
        raise DataError(
            f"rope_type {kind!r} of this model is not supported by the megatron backend",
            fix='use "default", "linear" or "llama3", or train.backend = "fsdp"',
        )
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return frequencies
