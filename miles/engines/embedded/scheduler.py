"""Continuous batching: requests join and leave the batch at every forward pass.

Owns the queue, the cache rows and what a pause, an abort or a weight update does to running requests. Single-threaded:
`worker` calls it from the engine's thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from miles.engines.embedded.attention import Segment
from miles.engines.embedded.model import PassResult, Runner
from miles.engines.embedded.request import ABORTED, Request, answer, finish_reason
from miles.engines.embedded.sampling import draw, log_probs_of
from miles.engines.embedded.weights import CheckpointWeights, WeightUpdateError
from miles.errors import EngineError

FIRST_VERSION = "default"
"""Weight version before the first update (SGLang's word)."""
NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running or queued. "
    "Retract or finish them, then call /flush_cache."
)

NOT_FINITE = {
    "type": "abort",
    "message": "the model's logits are not finite: its weights hold NaN or infinity",
    "status_code": 500,
    "err_type": "InternalServerError",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the engine."""

    max_running: int = 64
    """Requests in one pass."""
    prefill_tokens: int = 2048
    """Prompt tokens in one pass; longer prompts are read in several."""


class Scheduler:
    """The engine without threads and HTTP: `add` requests, call `step` until `idle`."""

    def __init__(
        self, runner: Runner, tokenizer: PreTrainedTokenizerBase | None, limits: Limits, eos: Iterable[int]
    ) -> None:
        self.runner = runner
        self.weights = CheckpointWeights(runner.model)
        self.limits = limits
        self.version = FIRST_VERSION
        self.paused = False
        self.session_open = False
        """Between `/begin_weight_update` and `/end_weight_update`."""
        self.released: set[str] = set()
        """Tags of memory that was given back."""
        self.drawn = 0
        """Tokens since the start, of whatever became of their requests."""
        self._tokenizer = tokenizer
        self._eos = frozenset(eos)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        """Index is cache row."""

    @property
    def idle(self) -> bool:
        """Nothing to do for `step`."""
        return self.paused or not (self._waiting or self._running)

    @property
    def counts(self) -> tuple[int, int]:
        """(running, waiting) requests."""
        return len(self._running), len(self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def abort(self, rid: str | None) -> None:
        """End the requests of `rid` (None: all) with what they have."""
        for request in [*self._running, *self._waiting]:
            if rid is None or rid in (request.rid, request.group):
                request.finish = dict(ABORTED)
        for request in [r for r in self._waiting if r.finish]:
            self._waiting.remove(request)
            self._report(request)
        self._remove_finished()

    def pause(self, mode: str) -> None:
        """Stop stepping: `abort` ends what runs, `in_place` keeps it, `retract` makes it start over from its tokens."""
        self.paused = True
        if mode == "abort":
            self.abort(None)
        if mode == "retract":
            for request in self._running:
                request.stored = 0
                request.retractions += 1
            self._waiting.extendleft(reversed(self._running))
            self._running.clear()

    def resume(self) -> None:
        """Step again."""
        self.paused = False

    def flush(self) -> bool:
        """Free the cache; False when a request still needs it."""
        if self._running or (self._waiting and not self.paused):
            return False
        self.runner.cache.release()
        return True

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: str | None, *, flush: bool) -> None:
        """Copy new weights in; WeightUpdateError says what was wrong."""
        self._require_weights()
        self.weights.update(named)
        self._updated(version, flush=flush)

    def update_weights_from_disk(self, directory: Path, version: str | None, *, flush: bool) -> None:
        """The same from a model directory."""
        self._require_weights()
        self.weights.update_from_disk(directory)
        self._updated(version, flush=flush)

    def checksums(self) -> dict[str, str]:
        """Of all weights, by checkpoint name."""
        self._require_weights()
        return self.weights.checksums()

    def _require_weights(self) -> None:
        if "weights" in self.released:
            raise WeightUpdateError("the memory of the weights is released; call /resume_memory_occupation first")

    def _updated(self, version: str | None, *, flush: bool) -> None:
        self.version = version if version is not None else self.version
        if flush and not self.flush():
            raise WeightUpdateError(NOT_FLUSHED)

    def release(self, tags: set[str]) -> None:
        """Give memory back; EngineError when requests run or it is released already."""
        if self._running or (self._waiting and not self.paused):
            raise EngineError("release_memory_occupation should be called only when server is idle.")
        if tags & self.released:
            raise EngineError(f"{', '.join(sorted(tags & self.released))}: released already")
        if "kv_cache" in tags:
            self.runner.cache.release()
        if "weights" in tags:
            self.weights.release()
        self.released |= tags

    def reacquire(self, tags: set[str]) -> None:
        """Take released memory again."""
        if tags - self.released:
            raise EngineError(f"{', '.join(sorted(tags - self.released))}: not released")
        if "weights" in tags:
            self.weights.resume()
        self.released -= tags

    def step(self) -> None:
        """One forward pass over running and newly admitted requests, and one token for each that is read in."""
        if self.released:
            raise EngineError(f"asked to generate while {', '.join(sorted(self.released))} is released")
        while self._waiting and len(self._running) < self.limits.max_running:
            self._running.append(self._waiting.popleft())
        segments = self._segments()
        tokens: list[int] = []
        asked: list[int] = []
        for segment in segments:
            request = self._running[segment.row]
            asked += [len(tokens) + i for i in _asked(request, segment)]
            tokens += request.tokens[segment.start : segment.stop]
        self._take(segments, self.runner.forward(tokens, segments, asked))
        self._remove_finished()

    def _segments(self) -> list[Segment]:
        """What each running request reads in this pass: its new token, or as much of its prompt as fits."""
        budget = self.limits.prefill_tokens
        segments = []
        for row, request in enumerate(self._running):
            length = request.total - request.stored
            if length > 1:
                length = min(length, budget)
                budget -= length
            if length:
                segments.append(Segment(row, request.stored, length))
        return segments

    def _take(self, segments: list[Segment], result: PassResult) -> None:
        """Hand the pass's results to the requests: routes, prompt log-probabilities, and a token to who is due."""
        due: list[Request] = []
        rows: list[int] = []
        read = row = 0
        for segment in segments:
            request = self._running[segment.row]
            request.stored = segment.stop
            if result.routes is not None and request.return_routes:
                request.take_routes(segment.start, result.routes[read : read + segment.length])
            read += segment.length
            count = len(_asked(request, segment))
            ends = request.stored == request.total
            if count > ends:
                self._take_prompt_log_probs(request, segment, result.logits[row : row + count - ends])
            row += count
            if ends and request.params.max_new_tokens == 0:
                request.finish = {"type": "length", "length": 0}
            elif ends:
                due.append(request)
                rows.append(row - 1)
        if not due:
            return
        self.drawn += len(due)
        drawn = draw(result.logits[rows], [r.params for r in due], [r.total for r in due])
        for request, token, log_prob in zip(due, drawn.tokens, drawn.log_probs, strict=True):
            request.append(token, log_prob, self.version)
            request.finish = finish_reason(request, self._eos, self._tokenizer)
            if not math.isfinite(log_prob):
                request.finish = dict(NOT_FINITE)
            if request.stream and request.finish is None:
                self._report(request)

    def _take_prompt_log_probs(self, request: Request, segment: Segment, logits: torch.Tensor) -> None:
        first = next(iter(_asked(request, segment))) + segment.start + 1
        targets = torch.tensor(request.prompt[first : first + len(logits)])
        log_probs = log_probs_of(logits.float(), targets)
        request.prompt_log_probs += log_probs.tolist()

    def _remove_finished(self) -> None:
        """Report finished requests and close the gaps that they leave among the cache rows."""
        for row in reversed(range(len(self._running))):
            request = self._running[row]
            if request.finish is None:
                continue
            self._report(request)
            last = self._running.pop()
            if last is not request:
                self.runner.cache.move(len(self._running), row, last.stored)
                self._running[row] = last

    def _report(self, request: Request) -> None:
        request.notify(answer(request, self.version, self._tokenizer))


def _asked(request: Request, segment: Segment) -> range:
    """Tokens of the segment (counted from its start) whose following logits are needed.

    Those are the last of all tokens, and where prompt log-probabilities are wanted also those that predict a prompt
    token which was not reported before.
    """
    ends = segment.stop == request.total
    first = segment.length - ends
    if request.prompt_log_probs_from is not None and not request.output:
        wanted = request.prompt_log_probs_from + len(request.prompt_log_probs)
        first = min(first, max(0, wanted - segment.start))
    return range(first, segment.length)
