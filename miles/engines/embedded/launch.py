"""Starting the embedded server: load the model, bind the port, serve until told to stop.

Owns the process's life. Everything that can go wrong ends as one EngineError.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import uvicorn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from miles.engines.embedded.model import Runner, load_runner
from miles.engines.embedded.protocol import ModelFacts
from miles.engines.embedded.scheduler import Limits, Scheduler
from miles.engines.embedded.server import Server
from miles.engines.embedded.worker import EngineWorker
from miles.errors import EngineError

DEFAULT_CONTEXT = 32768
"""Context length of a model whose config names none."""


@dataclass(frozen=True, slots=True)
class EmbeddedOptions:
    """How to run one embedded engine."""

    model: Path
    tokenizer: Path
    dtype: torch.dtype | Literal["auto"]
    host: str
    port: int
    token: str | None
    """Bearer token that requests must carry; None: everybody may."""
    context_length: int | None
    max_running_requests: int
    trust_remote_code: bool = False


def serve_embedded(options: EmbeddedOptions) -> None:
    """Serve until SIGINT, or SIGTERM where it is not ignored. Raises EngineError when it cannot start or fails."""
    # Bound before the model is loaded: a port in use is known at once.
    listener = _bind(options.host, options.port)
    disable_progress_bar()
    runner = load_runner(options.model, options.dtype, trust_remote_code=options.trust_remote_code)
    tokenizer = _tokenizer(options)
    facts = _facts(options, runner, tokenizer)
    limits = Limits(max_running=options.max_running_requests)
    scheduler = Scheduler(runner, tokenizer, limits, _eos(options.model, runner, tokenizer))
    worker = EngineWorker(scheduler)
    server = Server(worker, facts, _info(options, runner, facts))
    config = uvicorn.Config(
        server.app(options.token), log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="off"
    )
    uvicorn_server = _UvicornServer(config)

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def failed(error: BaseException) -> None:
            server.fail(error)
            uvicorn_server.should_exit = True

        def tell_loop(error: BaseException) -> None:
            loop.call_soon_threadsafe(failed, error)

        worker.start(tell_loop)
        await uvicorn_server.serve(sockets=[listener])

    asyncio.run(run())
    if worker.failure is not None:
        raise EngineError(f"the engine's thread failed: {worker.failure}") from worker.failure
    worker.stop()


class _UvicornServer(uvicorn.Server):
    """Goes on ignoring SIGTERM where it was ignored."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        with super().capture_signals():
            if ignored:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            yield


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise EngineError(
            f"cannot listen on {host}:{port}: {error.strerror}", fix="submit again: another port will be tried"
        ) from error
    return listener


def _tokenizer(options: EmbeddedOptions) -> PreTrainedTokenizerBase | None:
    """None where the directory has no tokenizer: text is then empty and prompts must be token ids."""
    if not any((options.tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise EngineError(f"cannot load the tokenizer in {options.tokenizer}: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _facts(options: EmbeddedOptions, runner: Runner, tokenizer: PreTrainedTokenizerBase | None) -> ModelFacts:
    longest = getattr(runner.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    wanted = options.context_length or longest
    if wanted > longest:
        raise EngineError(
            f"engine.context_length = {wanted} is more than the model's {longest} positions",
            fix=f"set engine.context_length to at most {longest}",
        )

    def encode(text: str) -> list[int]:
        assert tokenizer is not None
        return list(tokenizer(text)["input_ids"])

    return ModelFacts(
        vocabulary=runner.vocabulary,
        context_length=wanted,
        has_routes=runner.has_routes,
        encode=encode if tokenizer is not None else None,
    )


def _eos(directory: Path, runner: Runner, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """Tokens that end a response: those of the config, the generation config and the tokenizer."""
    sources: list[Any] = [runner.config.eos_token_id, getattr(tokenizer, "eos_token_id", None)]
    if (directory / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(directory).eos_token_id)
    return {token for source in sources for token in _as_list(source)}


def _as_list(value: Any) -> Iterable[int]:
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


def _info(options: EmbeddedOptions, runner: Runner, facts: ModelFacts) -> dict[str, Any]:
    return {
        "engine": "embedded",
        "model_path": str(options.model),
        "tokenizer_path": str(options.tokenizer),
        "model_type": runner.config.model_type,
        "architectures": runner.config.architectures,
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "device": "cpu",
        "context_length": facts.context_length,
        "max_running_requests": options.max_running_requests,
        "enable_return_routed_experts": facts.has_routes,
        "host": options.host,
        "port": options.port,
    }
