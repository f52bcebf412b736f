"""Names and shapes against what transformers writes, and fusing against its inverse, for every family and size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from miles.errors import ConfigError, DataError
from miles.models.mapping import (
    Geometry,
    Rule,
    Weight,
    check_layout,
    decoder_weights,
    fuse,
    geometry_of,
    padded_vocab_size,
    rank_slice,
    unfuse,
)

COMMON = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
}


def config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **COMMON | CONFIGS[family] | changes)


def geometry(family: str = "qwen3") -> Geometry:
    return geometry_of(config(family))


@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_shapes_are_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    AutoModelForCausalLM.from_config(config(family)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    weights = list(decoder_weights(geometry(family), fused_names=False))
    assert {name: shape for weight in weights for name, shape in zip(weight.hf, weight.shapes, strict=True)} == saved


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_unfuse_undoes_slicing_and_fusing(family: str, size: int) -> None:
    shape_of = geometry(family)
    for weight in decoder_weights(shape_of, fused_names=False):
        originals = [torch.randn(shape) for shape in weight.shapes]
        ranks = range(size) if weight.split is not None else range(1)
        shards = [
            fuse(weight, [o[rank_slice(weight, o.shape, rank, len(ranks))] for o in originals], shape_of, len(ranks))
            for rank in ranks
        ]
        assert len({shard.shape for shard in shards}) == 1, weight
        for original, whole in zip(originals, unfuse(weight, shards, shape_of), strict=True):
            assert torch.equal(original, whole), weight


def test_query_key_and_value_heads_are_grouped_by_key_value_head() -> None:
    """2 key/value heads, 4 query heads of one row each: q0 q1 k0 v0 q2 q3 k1 v1."""
    shape_of = replace(geometry(), heads=4, kv_heads=2, head_dim=1)
    weight = Weight("w", ("q", "k", "v"), ((4, 1), (2, 1), (2, 1)), Rule.QKV, split=0)
    parts = [torch.tensor(rows).reshape(-1, 1) for rows in ([0, 1, 2, 3], [10, 11], [20, 21])]
    assert fuse(weight, parts, shape_of, 1).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    second = [part[rank_slice(weight, part.shape, 1, 2)] for part in parts]
    assert fuse(weight, second, shape_of, 2).flatten().tolist() == [2, 3, 11, 21]


def test_vocabulary_is_padded_with_zeros_on_the_last_rank() -> None:
    shape_of = geometry()
    embedding = next(decoder_weights(shape_of, fused_names=False))
    rows = torch.randn(131, 32)
    last = fuse(embedding, [rows[rank_slice(embedding, rows.shape, 3, 4)]], shape_of, 4)
    assert padded_vocab_size(131, 4) == 132
    assert torch.equal(last, torch.cat([rows[99:], torch.zeros(1, 32)]))


def test_transformer_engine_names() -> None:
    names = [w.local_name(1, 2) for w in decoder_weights(geometry("qwen3_moe"), fused_names=True) if w.layer == 1]
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.0.mlp.experts.linear_fc1.weight1" in names
    dense = [w.local_name(0, 0) for w in decoder_weights(geometry("qwen3"), fused_names=True)]
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in dense
    assert not [name for name in dense if "input_layernorm" in name or "pre_mlp_layernorm" in name]


def test_router_settings() -> None:
    found = geometry_of(config("qwen3_moe", norm_topk_prob=False))
    assert found.sparse_layers == (False, True)
    assert (found.experts, found.experts_per_token, found.normalize_expert_weights) == (4, 2, False)


def test_an_unknown_family_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'qwen3_next'.*Did you mean 'qwen3"):
        geometry_of(AutoConfig.for_model("qwen3_next"))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("qwen2", {"use_sliding_window": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("qwen3", {"attention_dropout": 0.1}),
    ],
)
def test_what_the_modules_would_compute_otherwise_is_refused(family: str, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=json.dumps(next(iter(change))).strip('"')):
        geometry_of(config(family, **change))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 8}, r"tensor_parallel_size = 8 does not divide .*key/value heads \(4\)"),
        ({"pipeline": 3, "world_size": 3}, r"pipeline_parallel_size = 3 .*layers \(2\)"),
        ({"expert": 3}, r"expert_parallel_size = 3 .*experts \(4\)"),
        ({"tensor": 4, "pipeline": 2, "world_size": 4}, r"= 8 does not divide the number of ranks \(4\)"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(sizes: dict[str, int], message: str) -> None:
    layout = {"tensor": 1, "pipeline": 1, "expert": 1, "world_size": 12} | sizes
    with pytest.raises(ConfigError, match=message):
        check_layout(geometry("qwen3_moe"), **layout)


def test_experts_cannot_be_divided_in_a_dense_model() -> None:
    with pytest.raises(ConfigError, match="no experts"):
        check_layout(geometry("qwen3"), tensor=1, pipeline=1, expert=2, world_size=2)
