"""Finding the Python function that a grader's name stands for, and reading what it returned.

Owns the names (`exact`, `math`, `package.module:function`, `path/file.py:function`), the check of the
arguments and the meaning of a result. Where the function runs belongs to `miles.rewards.processes` and
`miles.rewards.grader`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from miles.errors import DataError, did_you_mean

BUILTIN = {"exact": "miles.rewards.exact:exact", "math": "miles.rewards.math_answers:math"}
POSITIONAL = ("prompt", "response", "label", "metadata")

GraderFunction = Callable[..., Any]


def load_function(name: str, args: Mapping[str, Any]) -> GraderFunction:
    """Import the grader `name` and check that it can be called with `args`. Raises DataError."""
    where, colon, function_name = BUILTIN.get(name, name).rpartition(":")
    if not colon or not where or not function_name:
        raise DataError(
            f"no grader '{name}'.{did_you_mean(name, BUILTIN)}",
            fix=f"use {', '.join(BUILTIN)}, package.module:function or path/file.py:function",
        )
    module = _import_file(name, Path(where)) if where.endswith(".py") else _import_module(name, where)
    functions = [key for key, value in vars(module).items() if inspect.isroutine(value)]
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(
            f"grader '{name}': {where} has no function '{function_name}'.{did_you_mean(function_name, functions)}",
            fix=f"define `def {function_name}(prompt, response, label, metadata): ...` there",
        )
    _check_arguments(name, function, args)
    return function


def scores_of(result: Any) -> dict[str, float]:
    """What a grader returned as finite numbers.

    `{"reward": ...}` and further parts. Raises TypeError, ValueError.
    """
    values = result if isinstance(result, dict) else {"reward": result}
    if "reward" not in values:
        raise ValueError(f"it returned a dict without 'reward' (keys: {', '.join(map(str, values)) or 'none'})")
    scores = {}
    for key, value in values.items():
        if not isinstance(value, Real | np.bool_):
            what = "" if key == "reward" else f" as '{key}'"
            raise TypeError(f"it returned a {type(value).__name__}{what}, not a number")
        if not math.isfinite(value):
            raise ValueError(f"it returned {float(value)} as '{key}'")
        scores[str(key)] = float(value)
    return scores


def describe(error: BaseException) -> str:
    """Exception type, message and the place that raised it, on one line."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} (at {error.filename}:{error.lineno})"
    files = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [place for place in files if place[0] not in (__file__, importlib.__file__) and place[0][0] != "<"]
    return f"{text} (at {own[-1][0]}:{own[-1][1]})" if own else text


def _import_module(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever user code raises at import
        raise DataError(
            f"grader '{name}': importing {module_name} failed: {describe(error)}",
            fix="modules are found from the working directory and PYTHONPATH; files as path/file.py:function",
        ) from error


def _import_file(name: str, path: Path) -> ModuleType:
    """Execute a file as a module; its directory joins sys.path, as if it were run as a script."""
    if not path.is_file():
        siblings = (other.name for other in path.parent.glob("*.py")) if path.parent.is_dir() else ()
        raise DataError(
            f"grader '{name}': file {path} does not exist.{did_you_mean(path.name, siblings)}",
            fix="correct rewards.grader; relative paths count from the run file",
        )
    directory = str(path.resolve().parent)
    if directory not in sys.path:
        sys.path.append(directory)
    spec = importlib.util.spec_from_file_location(f"miles_grader_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever user code raises at import
        raise DataError(
            f"grader '{name}': running {path} failed: {describe(error)}",
            fix=f"make the file importable by itself: `python {path}`",
        ) from error
    return module


def _check_arguments(name: str, function: GraderFunction, args: Mapping[str, Any]) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(*POSITIONAL, **args)
    except TypeError as error:
        accepted = [key for key in signature.parameters if key not in POSITIONAL]
        unknown = next((key for key in args if key not in accepted), None)
        reason = str(error) if unknown is None else f"it has no argument '{unknown}'.{did_you_mean(unknown, accepted)}"
        raise DataError(
            f"grader '{name}' cannot be called with rewards.args: {reason}",
            fix="its signature is fn(prompt, response, label, metadata, **args), with a keyword for each of"
            f" rewards.args ({', '.join(args) or 'none given'})",
        ) from error
