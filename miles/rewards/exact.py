"""The `exact` grader: the response equals the label, up to white space."""

from __future__ import annotations

from typing import Any


def exact(
    prompt: str,
    response: str,
    label: Any,
    metadata: dict[str, Any],
    *,
    after: str | None = None,
    ignore_case: bool = False,
) -> float:
    """1.0 where the response is the label after white space is normalised, else 0.0.

    With `after`, only the text behind its last occurrence counts, and a response without it scores 0.
    """
    if after is not None:
        _, marker, response = response.rpartition(after)
        if not marker:
            return 0.0
    given, wanted = _normalised(response), _normalised(str(label))
    if ignore_case:
        given, wanted = given.casefold(), wanted.casefold()
    return float(given == wanted)


def _normalised(text: str) -> str:
    return " ".join(text.split())
