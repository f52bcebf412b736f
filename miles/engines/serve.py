"""The process of one inference engine: `python -m miles.engines.serve --run-dir D --step NAME --index I --port P`.

Started by the supervisor. Decides which engine serves the step's model, and becomes it.
A MilesError ends it with that error's exit code and one readable block on stderr.

Owns that decision. torch is imported when a server starts, not with this module.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Literal

from miles.engines.sglang import serve_sglang, sglang_arguments
from miles.engines.spec import EngineSpec, engine_spec
from miles.errors import EngineError
from miles.runs.failures import exit_with_failures
from miles.runs.parent import end_with_parent
from miles.runs.paths import RunPaths

EngineKind = Literal["auto", "embedded", "sglang"]


def main() -> None:
    end_with_parent()
    end_by_interrupt_alone()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", required=True)
    parser.add_argument("--index", type=int, required=True, help="which of this node's engines")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    arguments = parser.parse_args()

    paths = RunPaths(arguments.run_dir)
    spec = engine_spec(paths, arguments.step, index=arguments.index, host=arguments.host, port=arguments.port)
    token = read_token(paths.engine_token)
    gpu = has_gpu()
    if choose_kind(spec.engine.kind, gpu=gpu) == "sglang":
        signal.signal(signal.SIGINT, signal.default_int_handler)
        serve_sglang(sglang_arguments(spec, gpu=gpu), token)
    else:
        _serve_embedded(spec, token)


def end_by_interrupt_alone() -> None:
    """From now on SIGINT ends this process, and what Slurm sends to every process of a job does not.

    The ranks are told by the same signal to end, and collect first what was generated.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # and without a stack in its log


def choose_kind(kind: EngineKind, *, gpu: bool) -> EngineKind:
    """`auto` is SGLang where there is a GPU."""
    if kind != "auto":
        return kind
    return "sglang" if gpu else "embedded"


def has_gpu() -> bool:
    """Whether this machine has a CUDA device."""
    import torch

    return torch.cuda.is_available()


def read_token(path: Path) -> str:
    """The run's engine token; EngineError when there is none."""
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise EngineError(f"cannot read the engine token {path}: {error.strerror}") from error
    if not token:
        raise EngineError(f"the engine token {path} is empty", fix="delete the file; the next start writes a new one")
    return token


def _serve_embedded(spec: EngineSpec, token: str) -> None:
    import torch

    from miles.engines.embedded.launch import EmbeddedOptions, serve_embedded

    serve_embedded(
        EmbeddedOptions(
            model=spec.model,
            tokenizer=spec.tokenizer,
            dtype="auto" if spec.dtype == "auto" else getattr(torch, spec.dtype),
            host=spec.host,
            port=spec.port,
            token=token,
            context_length=spec.engine.context_length,
            max_running_requests=spec.engine.max_running_requests,
            trust_remote_code=spec.trust_remote_code,
        )
    )


if __name__ == "__main__":
    exit_with_failures(main)
