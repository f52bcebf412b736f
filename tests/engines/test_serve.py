"""The engine's process: what a run's config asks for, and how it ends when it cannot start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from miles.engines.serve import choose_kind, read_token
from miles.engines.spec import engine_spec
from miles.errors import ConfigError, EngineError
from miles.runs.paths import RunPaths
from tests.engines import conftest
from tests.engines.conftest import ROOT, Engine, wait_until_healthy, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_moe: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), "embedded", tiny_moe)


def serve(run_dir: Path, *, port: int, step: str = "train") -> subprocess.CompletedProcess[str]:
    """The process of an engine that cannot start."""
    command = [sys.executable, "-m", "miles.engines.serve", "--run-dir", str(run_dir), "--step", step, "--index", "0"]
    return subprocess.run(
        [*command, "--port", str(port)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("kind", "gpu", "chosen"),
    [
        ("auto", True, "sglang"),
        ("auto", False, "embedded"),
        ("embedded", True, "embedded"),
        ("sglang", False, "sglang"),
    ],
)
def test_choice_of_engine(kind: str, gpu: bool, chosen: str) -> None:
    assert choose_kind(kind, gpu=gpu) == chosen  # type: ignore[arg-type]


def test_spec_of_a_step(run_dir: Path, tiny_moe: Path) -> None:
    spec = engine_spec(RunPaths(run_dir), "train", index=1, host="127.0.0.1", port=7)
    assert (spec.model, spec.tokenizer) == (tiny_moe / "model", tiny_moe / "model")
    assert (spec.dtype, spec.index, spec.port) == ("float32", 1, 7)


def test_unknown_step(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"no step 'trian'\. Did you mean 'train'\?"):
        engine_spec(RunPaths(run_dir), "trian", index=0, host="127.0.0.1", port=7)


def test_missing_and_empty_token(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot read the engine token"):
        read_token(tmp_path / "token")
    (tmp_path / "token").write_text("\n")
    with pytest.raises(EngineError, match="is empty"):
        read_token(tmp_path / "token")


def test_port_in_use(run_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = serve(run_dir, port=port)
    assert result.returncode == EngineError.exit_code
    assert f"error: cannot listen on 127.0.0.1:{port}: Address already in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_slurm_sends_to_every_process_of_a_job_does_not_end_it(
    run_dir: Path, tiny_moe: Path, unused_port: int
) -> None:
    process = conftest.serve(run_dir, "embedded", unused_port)
    server = Engine("embedded", f"http://127.0.0.1:{unused_port}", tiny_moe / "model")
    try:
        wait_until_healthy(server, process, run_dir)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
        assert server.get("/health_generate", token=None).status_code == 200
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        process.kill()
    assert "Traceback" not in (run_dir / "engine.log").read_text()


def test_broken_model_directory(tmp_path: Path, tiny_moe: Path) -> None:
    shutil.copytree(tiny_moe, tmp_path / "broken")
    run_dir = write_run(tmp_path, "embedded", tmp_path / "broken")
    weights = tmp_path / "broken" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = serve(run_dir, port=0)
    assert result.returncode == EngineError.exit_code
    assert f"error: cannot load the model {tmp_path / 'broken' / 'model'}" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_weights(tmp_path: Path, tiny_moe: Path) -> None:
    """transformers would fill them with random numbers."""
    shutil.copytree(tiny_moe, tmp_path / "partial")
    run_dir = write_run(tmp_path, "embedded", tmp_path / "partial")
    file = tmp_path / "partial" / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    result = serve(run_dir, port=0)
    assert result.returncode == EngineError.exit_code
    assert "has no weight 'model.norm.weight', which its config.json calls for (1 are missing)" in result.stderr


def test_context_beyond_the_model(tmp_path: Path, tiny_moe: Path) -> None:
    run_dir = write_run(tmp_path, "embedded", tiny_moe)
    config = run_dir / "run.toml"
    config.write_text(config.read_text().replace("max_running_requests = 16", "context_length = 99999"))
    result = serve(run_dir, port=0)
    assert result.returncode == EngineError.exit_code
    assert "error: engine.context_length = 99999 is more than the model's 2048 positions" in result.stderr


def test_model_with_a_recurrent_state(tmp_path: Path, tiny_moe: Path) -> None:
    shutil.copytree(tiny_moe, tmp_path / "hybrid")
    run_dir = write_run(tmp_path, "embedded", tmp_path / "hybrid")
    config = tmp_path / "hybrid" / "model" / "config.json"
    hybrid = {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 64, "vocab_size": 104,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"], "max_position_embeddings": 2048,
    }  # fmt: skip
    config.write_text(json.dumps(hybrid))
    result = serve(run_dir, port=0)
    assert result.returncode == EngineError.exit_code
    assert "error: the embedded engine cannot run 'qwen3_next'" in result.stderr
    assert 'fix: use engine.kind = "sglang"' in result.stderr
