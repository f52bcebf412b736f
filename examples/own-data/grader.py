"""A grader of one's own: partial credit for every character in the right place.

Miles calls it with the prompt, the response, the row's label and its metadata, and with `rewards.args` as keywords.
"""

from typing import Any


def characters(
    prompt: str, response: str, label: str, metadata: dict[str, Any], *, length_penalty: float = 0.0
) -> dict[str, float]:
    """Share of the label's characters that stand where they should, less a penalty per superfluous character.

    Only `reward` counts for training; the other values are logged.
    """
    right = sum(given == wanted for given, wanted in zip(response, label, strict=False)) / len(label)
    surplus = max(0, len(response) - len(label))
    return {"reward": right - length_penalty * surplus, "surplus": surplus}
