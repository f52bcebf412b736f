"""SGLang's arguments, and its token."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from miles.config.schema import EngineSection
from miles.engines import sglang
from miles.engines.sglang import serve_sglang, sglang_arguments
from miles.engines.spec import EngineSpec
from miles.errors import EngineError

SPEC = EngineSpec(
    model=Path("/models/m"),
    tokenizer=Path("/models/t"),
    trust_remote_code=False,
    dtype="bfloat16",
    engine=EngineSection(),
    index=2,
    host="127.0.0.1",
    port=30002,
)


def with_engine(**values: object) -> EngineSpec:
    from dataclasses import replace

    return replace(SPEC, engine=EngineSection(**values))  # type: ignore[arg-type]


def test_arguments_on_a_gpu() -> None:
    assert " ".join(sglang_arguments(SPEC, gpu=True)) == (
        "--model-path /models/m --tokenizer-path /models/t --host 127.0.0.1 --port 30002 --dtype bfloat16 "
        "--max-running-requests 64 --watchdog-timeout 120 --enable-memory-saver --enable-deterministic-inference "
        "--base-gpu-id 2"
    )


def test_arguments_on_a_cpu() -> None:
    assert " ".join(sglang_arguments(SPEC, gpu=False)) == (
        "--model-path /models/m --tokenizer-path /models/t --host 127.0.0.1 --port 30002 --dtype bfloat16 "
        "--max-running-requests 64 --watchdog-timeout 120 --device cpu --attention-backend torch_native "
        "--sampling-backend pytorch --grammar-backend none --disable-cuda-graph --disable-overlap-schedule"
    )


def test_the_users_arguments_come_last() -> None:
    spec = with_engine(
        context_length=4096, return_routed_experts=True, extra_args=["--tp-size", "2"], max_running_requests=8
    )
    arguments = sglang_arguments(spec, gpu=True)
    assert arguments[-5:] == ["--context-length", "4096", "--enable-return-routed-experts", "--tp-size", "2"]
    assert arguments[arguments.index("--max-running-requests") + 1] == "8"


def test_sglang_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "PACKAGE", "sglang_is_not_here")
    with pytest.raises(EngineError, match="SGLang is not installed"):
        serve_sglang([], "secret")


def test_the_token_does_not_reach_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    factory = logging.getLogRecordFactory()
    handler = logging.StreamHandler()
    logger = logging.getLogger("test-sglang-token")
    logger.addHandler(handler)
    try:
        sglang._redact("s3cret")
        logger.error("server_args=%s", {"api_key": "s3cret"})
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "server_args={'api_key': '[token]'}\n"
