"""Starting a real SGLang server in this process.

Owns SGLang's arguments and how its token stays secret. SGLang is imported when it is started.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from miles.engines.spec import EngineSpec
from miles.errors import EngineError

PACKAGE = "sglang"
MODULE = "sglang.launch_server"
GPU = (
    # The trainer stands on the same GPU: weights and cache must be able to leave it.
    "--enable-memory-saver",
    # SGLang reads sampling_seed only in this mode.
    "--enable-deterministic-inference",
)
CPU = (
    *("--device", "cpu"),
    *("--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch"),
    *("--grammar-backend", "none"),
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
)


def sglang_arguments(spec: EngineSpec, *, gpu: bool) -> list[str]:
    """Command-line arguments of `sglang.launch_server`, without the token. The user's come last and win.

    Without a GPU it runs slowly, with torch's own operators; the contract tests do that.
    """
    engine = spec.engine
    arguments = [
        *("--model-path", str(spec.model)),
        *("--tokenizer-path", str(spec.tokenizer)),
        *("--host", spec.host),
        *("--port", str(spec.port)),
        *("--dtype", spec.dtype),
        *("--max-running-requests", str(engine.max_running_requests)),
        *("--watchdog-timeout", f"{engine.hang_timeout:g}"),
        *(GPU if gpu else CPU),
    ]
    if gpu:
        arguments += ["--base-gpu-id", str(spec.index)]
    if engine.context_length is not None:
        arguments += ["--context-length", str(engine.context_length)]
    if engine.return_routed_experts:
        arguments.append("--enable-return-routed-experts")
    if spec.trust_remote_code:
        arguments.append("--trust-remote-code")
    return arguments + engine.extra_args


def serve_sglang(arguments: Sequence[str], token: str) -> None:
    """Become an SGLang server that demands `token`; returns when it ends. EngineError when it is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise EngineError(
            "engine.kind is sglang, but SGLang is not installed in this environment",
            fix='install miles-hpc[gpu], or set engine.kind = "embedded"',
        )
    _redact(token)
    # By default /health generates a token, which kills a server whose memory is released. Without, it tells that the
    # server's front answers; a scheduler that hangs is ended by the watchdog, and one that dies ends the server.
    os.environ["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "false"
    # Set inside the process: another user of the node sees the command line that the process was started with.
    sys.argv = [MODULE, *arguments, "--api-key", token]
    try:
        runpy.run_module(MODULE, run_name="__main__")
    except Exception as error:
        raise EngineError(f"SGLang ended with {type(error).__name__}: {error}", fix="its log is above") from error


def _redact(token: str) -> None:
    """Keep the token out of the log: SGLang writes its arguments there when it starts."""
    make_record = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make_record(*args, **kwargs)
        message = made.getMessage()
        if token in message:
            made.msg, made.args = message.replace(token, "[token]"), None
        return made

    logging.setLogRecordFactory(record)
