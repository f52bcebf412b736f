"""Model directories: partial reads, shards, and what a damaged one is answered with."""

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from miles.errors import DataError
from miles.models import checkpoint
from miles.models.checkpoint import CheckpointReader, write_model

ALL = (slice(None), slice(None))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory).state_dict())


def test_reads_a_part(source: Path) -> None:
    whole = tensors(source)["model.embed_tokens.weight"]
    with CheckpointReader(source) as reader:
        part = reader.read("model.embed_tokens.weight", (64, 16), (slice(3, 9), slice(4, 8)))
        assert "model.norm.weight" in reader.names
    assert torch.equal(part, whole[3:9, 4:8])


def test_copy_of_a_model_in_shards_opens(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 4096)
    weights = tensors(source)
    write_model(tmp_path / "copy", weights.items(), source, torch.float32)
    names = sorted(file.name for file in (tmp_path / "copy").iterdir())
    assert "tokenizer.json" in names and not [name for name in names if "partial" in name]
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    modes = {file.stat().st_mode for file in (tmp_path / "copy").iterdir()}
    assert len(modes) == 1, "who may read the config may read the weights"
    copy = tensors(tmp_path / "copy")
    assert all(torch.equal(copy[name], value) for name, value in weights.items())
    with CheckpointReader(tmp_path / "copy") as reader:
        assert torch.equal(reader.read("lm_head.weight", (64, 16), ALL), weights["lm_head.weight"])


def test_config_names_the_written_dtype(source: Path, tmp_path: Path) -> None:
    halves = {name: value.bfloat16() for name, value in tensors(source).items()}
    write_model(tmp_path / "copy", halves.items(), source, torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy").dtype == torch.bfloat16


def test_a_refusing_disk_is_an_os_error(source: Path, tmp_path: Path) -> None:
    """safetensors has errors of its own, with the system's number in their text."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model-00001.safetensors.partial") as caught:
            write_model(tmp_path / "copy", [("weight", torch.zeros(10_000))], source, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_a_reused_buffer_is_copied(source: Path, tmp_path: Path) -> None:
    buffer = torch.zeros(2)

    def weights():
        for value in (1.0, 2.0):
            yield f"w{value:.0f}", buffer.fill_(value)

    write_model(tmp_path / "copy", weights(), source, torch.float32)
    with CheckpointReader(tmp_path / "copy") as reader:
        assert reader.read("w1", (2,), (slice(None),)).tolist() == [1.0, 1.0]


def test_a_missing_weight_is_named(source: Path) -> None:
    with CheckpointReader(source) as reader, pytest.raises(DataError, match=r"no weight 'model.layers.7"):
        reader.read("model.layers.7.mlp.gate_proj.weight", (32, 16), ALL)


def test_another_shape_is_named(source: Path) -> None:
    with CheckpointReader(source) as reader, pytest.raises(DataError, match=r"\(64, 16\).*calls for \(65, 16\)"):
        reader.read("lm_head.weight", (65, 16), ALL)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither model.safetensors nor"):
        CheckpointReader(tmp_path)


def test_a_truncated_file(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cannot read .*model.safetensors"):
        CheckpointReader(source)


def test_a_shard_that_is_not_there(source: Path) -> None:
    save_file({"a": torch.zeros(1)}, source / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (source / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match="lacks model-00002-of-00002"):
        CheckpointReader(source)
