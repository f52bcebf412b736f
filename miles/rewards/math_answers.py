r"""The `math` grader: the response's final answer is mathematically equal to the label (library math-verify).

Must run in the main thread of its process: math-verify limits its own work with SIGALRM, because a response
can hold an expression that takes forever to simplify. `miles.rewards.processes` sees to that.
"""

from __future__ import annotations

from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

SECONDS_PER_EXPRESSION = 3


def math(prompt: str, response: str, label: Any, metadata: dict[str, Any], *, boxed: bool = False) -> float:
    r"""1.0 where the answer equals the label, else 0.0; an answer that takes too long to compare is wrong.

    The answer is the last `\boxed{...}`, or without one the last LaTeX or plain expression. With `boxed =
    true` a response without `\boxed` scores 0. The label may be a number, plain text or LaTeX. Raises
    ValueError for a label without any expression in it.
    """
    reference = str(label)
    if "\\boxed" not in reference and "$" not in reference:
        reference = f"\\boxed{{{reference}}}"
    wanted = parse(reference, parsing_timeout=SECONDS_PER_EXPRESSION)
    if not wanted:
        raise ValueError(f"label {label!r} holds no mathematical expression")
    if boxed and "\\boxed" not in response:
        return 0.0
    given = parse(
        response,
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()],
        parsing_timeout=SECONDS_PER_EXPRESSION,
    )
    return float(verify(wanted, given, timeout_seconds=SECONDS_PER_EXPRESSION))
