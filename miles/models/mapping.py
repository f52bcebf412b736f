"""Names and shapes of a decoder's weights, in Hugging Face checkpoints and in megatron-core, and back.

Pure functions of shapes and tensors: no model, no process group, no files; `miles.training.megatron.weights`
moves the tensors. Families: Llama, Qwen2, Qwen3 and Qwen3-MoE; they differ in their `Geometry` only.

How megatron-core keeps a layer (T = tensor-parallel size; each rank holds 1/T of every checkpoint tensor):

- `linear_qkv`: for each key/value head its query heads, then the key head, then the value head;
- `linear_fc1`: the rank's rows of gate_proj, then those of up_proj;
- vocabulary rows are padded with zeros to a multiple of T;
- experts are whole on the ranks that own them, never divided by T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from miles.errors import ConfigError, DataError, did_you_mean
from miles.models.families import MEGATRON_FAMILIES


@dataclass(frozen=True, slots=True)
class Geometry:
    """Everything about a decoder that decides names, shapes and arithmetic."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    """Input and output embedding are one tensor."""
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    sparse_layers: tuple[bool, ...]
    """For each layer: does it have experts?"""
    experts: int
    """0 for a dense model."""
    experts_per_token: int
    moe_intermediate_size: int
    normalize_expert_weights: bool
    """The weights of the chosen experts sum to 1."""


def geometry_of(config: Any) -> Geometry:
    """The geometry of a `transformers` config; `DataError` where it asks for what the mapping cannot keep."""
    family = config.model_type
    if family not in MEGATRON_FAMILIES:
        raise DataError(
            f"model_type {family!r} cannot be mapped to megatron-core{did_you_mean(family, MEGATRON_FAMILIES)}",
            fix=f'use one of {", ".join(MEGATRON_FAMILIES)}, or train.backend = "fsdp"',
        )
    _require(config, family)
    experts = config.num_experts if family == "qwen3_moe" else 0
    return Geometry(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied=config.tie_word_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family.startswith("qwen3"),
        norm_eps=config.rms_norm_eps,
        sparse_layers=tuple(_is_sparse(config, layer, experts) for layer in range(config.num_hidden_layers)),
        experts=experts,
        experts_per_token=config.num_experts_per_tok if experts else 0,
        moe_intermediate_size=config.moe_intermediate_size if experts else 0,
        normalize_expert_weights=bool(experts) and config.norm_topk_prob,
    )


def _require(config: Any, family: str) -> None:
    """Refuse what the mapped modules would compute differently."""
    unsupported = {
        "hidden_act": config.hidden_act != "silu",
        "attention_bias": family != "qwen2" and getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "use_sliding_window": getattr(config, "use_sliding_window", False),
        "attention_dropout": config.attention_dropout != 0,
    }
    for key, refused in unsupported.items():
        if refused:
            raise DataError(
                f"this {family} model has {key} = {getattr(config, key)!r}, which the megatron backend lacks",
                fix='train.backend = "fsdp" runs the Hugging Face implementation',
            )


def _is_sparse(config: Any, layer: int, experts: int) -> bool:
    if not experts or layer in (config.mlp_only_layers or []):
        return False
    return bool((layer + 1) % config.decoder_sparse_step == 0)


class Rule(StrEnum):
    """How checkpoint tensors make one Megatron parameter."""

    COPY = "copy"
    QKV = "qkv"
    CONCATENATE = "concatenate"


class Place(StrEnum):
    """Which pipeline stage owns a weight."""

    FIRST = "first"
    LAYER = "layer"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Weight:
    """One Megatron parameter and the checkpoint tensors that it is made of."""

    megatron: str
    """Name in the `GPTModel` of one rank; `{layer}` and `{expert}` stand for numbers local to it."""
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the checkpoint tensors."""
    rule: Rule = Rule.COPY
    split: int | None = None
    """Dimension of every checkpoint tensor that tensor parallelism divides; None: each rank has all of it."""
    place: Place = Place.LAYER
    layer: int = 0
    expert: int | None = None

    def local_name(self, first_layer: int, first_expert: int) -> str:
        """Name on a rank whose stage begins at `first_layer` and whose experts begin at `first_expert`."""
        expert = None if self.expert is None else self.expert - first_expert
        return self.megatron.format(layer=self.layer - first_layer, expert=expert)


def decoder_weights(geometry: Geometry, *, fused_names: bool) -> Iterator[Weight]:
    """All weights in the order of the computation. Tied output weights are not listed.

    `fused_names`: the names of Transformer Engine's modules, which hold a layer norm inside the linear layer
    after it and all experts in one module, instead of megatron-core's own.
    """
    vocabulary = (geometry.vocab_size, geometry.hidden_size)
    yield Weight(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        (vocabulary,),
        split=0,
        place=Place.FIRST,
    )
    for layer in range(geometry.layers):
        yield from _attention_weights(geometry, layer, fused_names)
        if geometry.sparse_layers[layer]:
            yield from _expert_weights(geometry, layer, fused_names)
        else:
            yield from _mlp_weights(geometry, layer, fused_names)
    norm = ((geometry.hidden_size,),)
    yield Weight("decoder.final_layernorm.weight", ("model.norm.weight",), norm, place=Place.LAST)
    if not geometry.tied:
        yield Weight("output_layer.weight", ("lm_head.weight",), (vocabulary,), split=0, place=Place.LAST)


def tied_output_weight(geometry: Geometry) -> Weight:
    """The copy of the tied embedding that the last of several pipeline stages holds."""
    shape = (geometry.vocab_size, geometry.hidden_size)
    return Weight("output_layer.weight", ("model.embed_tokens.weight",), (shape,), split=0, place=Place.LAST)


def _attention_weights(geometry: Geometry, layer: int, fused_names: bool) -> Iterator[Weight]:
    megatron, hf = "decoder.layers.{layer}.", f"model.layers.{layer}."
    attention, width = f"{hf}self_attn.", geometry.hidden_size
    query, key = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    norm = "self_attention.linear_qkv.layer_norm_weight" if fused_names else "input_layernorm.weight"
    yield Weight(f"{megatron}{norm}", (f"{hf}input_layernorm.weight",), ((width,),), layer=layer)
    for kind, columns in (("weight", (width,)), ("bias", ())):
        if kind == "weight" or geometry.qkv_bias:
            yield Weight(
                f"{megatron}self_attention.linear_qkv.{kind}",
                tuple(f"{attention}{part}_proj.{kind}" for part in "qkv"),
                ((query, *columns), (key, *columns), (key, *columns)),
                Rule.QKV,
                split=0,
                layer=layer,
            )
    if geometry.qk_norm:
        for part in "qk":
            yield Weight(
                f"{megatron}self_attention.{part}_layernorm.weight",
                (f"{attention}{part}_norm.weight",),
                ((geometry.head_dim,),),
                layer=layer,
            )
    yield Weight(
        f"{megatron}self_attention.linear_proj.weight",
        (f"{attention}o_proj.weight",),
        ((width, query),),
        split=1,
        layer=layer,
    )


def _mlp_weights(geometry: Geometry, layer: int, fused_names: bool) -> Iterator[Weight]:
    megatron, hf = "decoder.layers.{layer}.", f"model.layers.{layer}."
    width, inner = geometry.hidden_size, geometry.intermediate_size
    norm = "mlp.linear_fc1.layer_norm_weight" if fused_names else "pre_mlp_layernorm.weight"
    yield Weight(f"{megatron}{norm}", (f"{hf}post_attention_layernorm.weight",), ((width,),), layer=layer)
    yield Weight(
        f"{megatron}mlp.linear_fc1.weight",
        (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
        ((inner, width), (inner, width)),
        Rule.CONCATENATE,
        split=0,
        layer=layer,
    )
    yield Weight(
        f"{megatron}mlp.linear_fc2.weight",
        (f"{hf}mlp.down_proj.weight",),
        ((width, inner),),
        split=1,
        layer=layer,
    )


def _expert_weights(geometry: Geometry, layer: int, fused_names: bool) -> Iterator[Weight]:
    megatron, hf = "decoder.layers.{layer}.", f"model.layers.{layer}."
    width, inner = geometry.hidden_size, geometry.moe_intermediate_size
    norm, router = (f"{hf}post_attention_layernorm.weight",), (f"{hf}mlp.gate.weight",)
    yield Weight(f"{megatron}pre_mlp_layernorm.weight", norm, ((width,),), layer=layer)
    yield Weight(f"{megatron}mlp.router.weight", router, ((geometry.experts, width),), layer=layer)
    module = "mlp.experts.{}.weight{{expert}}" if fused_names else "mlp.experts.local_experts.{{expert}}.{}.weight"
    for expert in range(geometry.experts):
        source = f"{hf}mlp.experts.{expert}."
        yield Weight(
            megatron + module.format("linear_fc1"),
            (f"{source}gate_proj.weight", f"{source}up_proj.weight"),
            ((inner, width), (inner, width)),
            Rule.CONCATENATE,
            layer=layer,
            expert=expert,
        )
        yield Weight(
            megatron + module.format("linear_fc2"),
            (f"{source}down_proj.weight",),
            ((width, inner),),
            layer=layer,
            expert=expert,
        )


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the vocabulary with the padding that makes them divisible."""
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


def rank_slice(weight: Weight, shape: Sequence[int], rank: int, size: int) -> tuple[slice, ...]:
    """The part of a checkpoint tensor that tensor-parallel rank `rank` of `size` reads; no padding rows."""
    if weight.split is None:
        return tuple(slice(None) for _ in shape)
    block = -(-shape[weight.split] // size)
    start, stop = (min(edge, shape[weight.split]) for edge in (rank * block, (rank + 1) * block))
    return tuple(slice(start, stop) if dim == weight.split else slice(None) for dim in range(len(shape)))


def fuse(weight: Weight, parts: Sequence[torch.Tensor], geometry: Geometry, size: int) -> torch.Tensor:
    """One rank's Megatron parameter from its slices of the checkpoint tensors."""
    if weight.rule is Rule.QKV:
        groups = geometry.kv_heads // size
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    if weight.rule is Rule.CONCATENATE:
        return torch.cat(list(parts))
    part = parts[0]
    if weight.split is None:
        return part
    missing = -(-weight.shapes[0][weight.split] // size) - part.shape[weight.split]
    return part if missing == 0 else torch.cat([part, part.new_zeros(missing, *part.shape[1:])])


def unfuse(weight: Weight, shards: Sequence[torch.Tensor], geometry: Geometry) -> list[torch.Tensor]:
    """The whole checkpoint tensors from the Megatron parameters of all tensor-parallel ranks, in rank order.

    A weight that is not divided takes one shard. The inverse of `rank_slice` and `fuse`.
    """
    pieces = [_parts(weight, shard, geometry, len(shards)) for shard in shards]
    columns = list(zip(*pieces, strict=True))
    if weight.split is None or len(shards) == 1:
        wholes = [column[0] for column in columns]
    else:
        wholes = [torch.cat(column, dim=weight.split) for column in columns]
    return [whole[: shape[0]] for whole, shape in zip(wholes, weight.shapes, strict=True)]


def _parts(weight: Weight, shard: torch.Tensor, geometry: Geometry, size: int) -> list[torch.Tensor]:
    """One rank's slices of the checkpoint tensors, padding rows included."""
    if weight.rule is Rule.QKV:
        grouped = shard.reshape(geometry.kv_heads // size, -1, *shard.shape[1:])
        query = geometry.heads // geometry.kv_heads * geometry.head_dim
        widths = [query, geometry.head_dim, geometry.head_dim]
        return [part.flatten(0, 1) for part in grouped.split(widths, dim=1)]
    if weight.rule is Rule.CONCATENATE:
        return list(shard.chunk(len(weight.hf)))
    return [shard]


def check_layout(geometry: Geometry, *, tensor: int, pipeline: int, expert: int, world_size: int) -> None:
    """`ConfigError` where the model or the number of ranks does not divide by the parallel sizes."""
    if expert > 1 and not geometry.experts:
        raise ConfigError(f"train.expert_parallel_size = {expert}, but the model has no experts", fix="set it to 1")
    divisions = [
        ("tensor_parallel_size", tensor, "the model's key/value heads", geometry.kv_heads),
        ("tensor_parallel_size", tensor, "the model's intermediate_size", geometry.intermediate_size),
        ("pipeline_parallel_size", pipeline, "the model's layers", geometry.layers),
        ("expert_parallel_size", expert, "the model's experts", geometry.experts),
        (
            "tensor_parallel_size x train.pipeline_parallel_size",
            tensor * pipeline,
            "the number of ranks",
            world_size,
        ),
        (
            "expert_parallel_size x train.pipeline_parallel_size",
            expert * pipeline,
            "the number of ranks",
            world_size,
        ),
    ]
    for name, size, what, total in divisions:
        if total % size:
            raise ConfigError(
                f"train.{name} = {size} does not divide {what} ({total})",
                fix=f"choose a divisor of {total}",
            )
