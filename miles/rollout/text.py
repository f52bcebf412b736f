"""The text of a response, and the stop strings in it, from its tokens alone.

An engine looks only at what it generated in one request, and a response may come from several. So where a stop string
spreads over two requests it is found here, and the text is decoded here, always: neither depends on where a response
was interrupted. The rules are those of the engines (SGLang's), applied to the whole response. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from miles.data.sample import FinishReason

Decode = Callable[[list[int]], str]
"""Token ids -> text, without special tokens."""


@dataclass(frozen=True, slots=True)
class ResponseText:
    """How responses of one step read and end."""

    decode: Decode
    stop: tuple[str, ...] = ()
    """Strings that end a response; the first one of this order that is found counts."""

    def stop_across(self, tokens: Sequence[int], known: int) -> int | None:
        """Length at which `tokens` should have ended, where a stop string begins in the first `known` tokens (which an
        earlier request generated) and ends after them; None: no such string.
        """
        if not self.stop or known == 0:
            return None
        last = min(len(tokens), known + self._window)
        return next((end for end in range(known + 1, last + 1) if self._matched(tokens[:end])), None)

    def of(self, tokens: Sequence[int], finish: FinishReason) -> str:
        """The text of a finished response, without the token or string that ended it."""
        tokens = list(tokens)
        matched = self._matched(tokens) if finish is FinishReason.STOP else None
        if finish is FinishReason.STOP and matched is None:
            tokens = tokens[:-1]
        text = self.decode(tokens)
        return text[: text.find(matched)] if matched and matched in text else text

    @property
    def _window(self) -> int:
        """Tokens over which a stop string of b bytes can spread, and the one after it."""
        return max((len(text.encode()) for text in self.stop), default=0) + 1

    def _matched(self, tokens: Sequence[int]) -> str | None:
        """The stop string that the newest token completes."""
        if not self.stop:
            return None
        tail = self.decode(list(tokens[-self._window :]))
        return next((text for text in self.stop if text in tail), None)
