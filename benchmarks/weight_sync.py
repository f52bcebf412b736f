"""Seconds until a real SGLang server holds the trainer's weights: python benchmarks/weight_sync.py --shape dense-1b

One server with random weights and one sender share a GPU, as colocated ones do. The sender's tensors have the names and
shapes of the checkpoint, and travel

- `push`: by `miles.sync`, in buckets of several sizes (copied into a bucket, then by the engine out of it);
- `in place`: from one region of memory in which they already lie end to end, so that only the engine copies;
- `disk`: as a checkpoint in a file system in memory, which the engine loads again.

Beside them the limits of the same bytes on the same device: one copy from device to device, the same copy tensor by
tensor, and a request that changes one norm. After the pushes the engine's checksums are compared with those after the
first. Writes benchmarks/results/weight-sync-SHAPE-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from provenance import commit, machine  # noqa: E402

from miles.cluster.ports import choose_ports  # noqa: E402
from miles.config.schema import EngineSection  # noqa: E402
from miles.engines.sglang import serve_sglang, sglang_arguments  # noqa: E402
from miles.engines.spec import EngineSpec  # noqa: E402
from miles.errors import EngineLost, UnknownRouteError  # noqa: E402
from miles.models.mapping import decoder_weights, geometry_of  # noqa: E402
from miles.sync.push import WeightSync  # noqa: E402
from miles.sync.wire import Bucket  # noqa: E402

TOKEN = "weight-sync"
MIB = 2**20
ATTENTION = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": False}
DENSE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **ATTENTION}
MOE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True, **ATTENTION}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": DENSE
    | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4}
    | {"vocab_size": 1024},
    "dense-1b": DENSE
    | {"hidden_size": 1536, "intermediate_size": 4608, "num_attention_heads": 16, "num_hidden_layers": 20},
    "dense-8b": DENSE
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36},
    "moe-8b": MOE
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_hidden_layers": 12}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "num_key_value_heads": 4},
}


@dataclass(frozen=True)
class Server:
    """A server that runs, as `WeightSync` wants to speak to it."""

    client: httpx.Client

    def post(self, path: str, bodies: Sequence[dict], engines: Sequence[int]) -> list[dict | EngineLost]:
        answer = self.client.post(path, json=bodies[0])
        if answer.status_code == 404:
            raise UnknownRouteError(path)
        answer.raise_for_status()
        return [answer.json()]

    def checksums(self) -> dict[str, str]:
        (answer,) = self.post("/weights_checker", [{"action": "checksum"}], [0])
        assert isinstance(answer, dict)
        return dict(answer["ranks"][0]["checksums"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="dense-1b")
    parser.add_argument("--buckets", type=int, nargs="+", default=[64, 256, 512, 1024, 65536], help="MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-disk", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_sglang(json.loads(arguments.serve), TOKEN)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name().replace(" ", "-").lower() if device.type == "cuda" else "cpu"
    output = arguments.output or ROOT / "benchmarks" / "results" / f"weight-sync-{arguments.shape}-{name}.json"
    directory = Path(tempfile.mkdtemp(prefix="miles-sync-", dir="/dev/shm"))
    try:
        found = measure(arguments, device, directory)
    finally:
        shutil.rmtree(directory)
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def measure(arguments: argparse.Namespace, device: torch.device, directory: Path) -> dict[str, Any]:
    config = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16"}
    config |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, **SHAPES[arguments.shape]}
    (directory / "config.json").write_text(json.dumps(config))
    process, server = start(directory, device)
    try:
        weights = random_weights(directory, device)
        total = sum(tensor.nbytes for _, tensor in weights)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        results: dict[str, Any] = {"limits": limits(weights, device, server, arguments.rounds)}
        sums: set[str] = set()
        for mib in arguments.buckets:
            sync = WeightSync(server.post, engines=1, dtype=torch.bfloat16, bucket_bytes=mib * MIB, verify=False)
            results[f"push {mib} MiB"] = timed(lambda sync=sync: sync.push(weights, 1, [0]), device, arguments.rounds)
            sums.add(json.dumps(server.checksums(), sort_keys=True))
        region = Bucket(weights)
        results["in place"] = timed(lambda: push_in_place(server, region), device, arguments.rounds)
        sums.add(json.dumps(server.checksums(), sort_keys=True))
        if not arguments.no_disk:
            results["disk"] = from_disk(weights, directory, server, device)
            sums.add(json.dumps(server.checksums(), sort_keys=True))
        for ways in results.values():
            if "median" in ways:
                ways["gb_per_second"] = round(total / ways["median"] / 1e9, 1)
        return {
            "machine": machine() | {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"},
            "commit": commit(),
            "sglang": server.client.get("/server_info").json().get("version"),
            "shape": arguments.shape,
            "config": SHAPES[arguments.shape],
            "tensors": len(weights),
            "bytes": total,
            "same_checksums_after_each_way": len(sums) == 1,
            "results": results,
        }
    finally:
        process.terminate()
        process.wait(60)


def start(directory: Path, device: torch.device) -> tuple[subprocess.Popen, Server]:
    """A server with dummy weights, ready."""
    (port,) = choose_ports(1, seed=os.getpid())
    extra = ["--load-format", "dummy", "--skip-tokenizer-init", "--mem-fraction-static", "0.45"]
    extra += ["--max-total-tokens", "16000", "--skip-server-warmup"]
    if device.type == "cuda":
        extra += ["--disable-cuda-graph"]
    engine = EngineSection(extra_args=extra, max_running_requests=8)
    spec = EngineSpec(directory, directory, False, "bfloat16", engine, 0, "127.0.0.1", port)
    arguments = sglang_arguments(spec, gpu=device.type == "cuda")
    log = Path(tempfile.gettempdir()) / "weight-sync-server.log"
    environment = os.environ | {"PYTHONPATH": os.environ.get("SERVER_PYTHONPATH", os.environ.get("PYTHONPATH", ""))}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(arguments)],
            stdout=stream, stderr=stream, env=environment,
        )  # fmt: skip
    headers = {"Authorization": f"Bearer {TOKEN}"}
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=600)
    while True:
        if process.poll() is not None:
            raise SystemExit("\n".join(log.read_text().splitlines()[-40:]))
        try:
            if client.get("/model_info").status_code == 200:
                return process, Server(client)
        except httpx.TransportError:
            pass
        time.sleep(0.5)


def random_weights(directory: Path, device: torch.device) -> list[tuple[str, torch.Tensor]]:
    from transformers import AutoConfig

    geometry = geometry_of(AutoConfig.from_pretrained(directory))
    torch.manual_seed(0)
    weights = []
    for weight in decoder_weights(geometry, fused_names=False):
        for name, shape in zip(weight.hf, weight.shapes, strict=True):
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
            weights.append((name, tensor.normal_(0, 0.02)))
    return weights


def push_in_place(server: Server, region: Bucket) -> None:
    """One request for weights that lie end to end already. A handle serves one receiver once, so each has a new one."""
    try:
        server.post("/begin_weight_update", [{}], [0])
        bracketed = True
    except UnknownRouteError:
        bracketed = False
    body = {"serialized_named_tensors": [region.dumps()], "load_format": "flattened_bucket", "flush_cache": True}
    server.post("/update_weights_from_tensor", [body | {"weight_version": "2"}], [0])
    if bracketed:
        server.post("/end_weight_update", [{}], [0])


def limits(
    weights: list[tuple[str, torch.Tensor]], device: torch.device, server: Server, rounds: int
) -> dict[str, dict[str, float]]:
    total = sum(tensor.nbytes for _, tensor in weights)
    flat = torch.empty(total, dtype=torch.uint8, device=device)
    other = torch.empty_like(flat)
    views, begin = [], 0
    for _, tensor in weights:
        views.append(flat[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        begin += tensor.nbytes

    def one_by_one() -> None:
        for view, (_, tensor) in zip(views, weights, strict=True):
            view.copy_(tensor)

    norm = [(name, tensor) for name, tensor in weights if name == "model.norm.weight"]
    sync = WeightSync(server.post, engines=1, dtype=torch.bfloat16, bucket_bytes=MIB, verify=False)
    found = {
        "one copy": timed(lambda: other.copy_(flat), device, rounds),
        "copy tensor by tensor": timed(one_by_one, device, rounds),
        "a request with one norm": timed(lambda: sync.push(norm, 1, [0]), device, rounds),
    }
    for way in ("one copy", "copy tensor by tensor"):
        found[way]["gb_per_second"] = round(total / found[way]["median"] / 1e9, 1)
    return found


def from_disk(
    weights: list[tuple[str, torch.Tensor]], directory: Path, server: Server, device: torch.device
) -> dict[str, Any]:
    from safetensors.torch import save_file

    began = time.perf_counter()
    save_file({name: tensor.contiguous().cpu() for name, tensor in weights}, directory / "model.safetensors")
    saved = time.perf_counter() - began
    body = {"model_path": str(directory), "load_format": "auto"}
    loaded = timed(lambda: server.post("/update_weights_from_disk", [body], [0]), device, 3)
    return {"save_seconds": round(saved, 3), "load_seconds": loaded}


def timed(work: Callable[[], object], device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of the first time and of the times after it."""
    seconds = []
    for _ in range(rounds + 1):
        _settle(device)
        began = time.perf_counter()
        work()
        _settle(device)
        seconds.append(time.perf_counter() - began)
    first, steady = seconds[0], seconds[1:]
    return {
        "first": round(first, 5), "median": round(statistics.median(steady), 5),
        "least": round(min(steady), 5), "most": round(max(steady), 5),
    }  # fmt: skip


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
