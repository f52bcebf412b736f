"""docs/errors.md, made of the catalogue: `python -m tests.error_catalogue.page > docs/errors.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from miles.errors import ConfigError, DataError, EngineError, Interrupted, RunError, TrainerError
from tests.config.test_messages import CASES, FILES, SYNTAX
from tests.error_catalogue.command import flat
from tests.error_catalogue.inputs import BAD_DATA, BAD_GRADERS, BAD_MODELS, BadInput
from tests.error_catalogue.situations import DIRECTORY, GRADING, RUNNING, Situation

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

Row = tuple[str, str, str, int]
"""Situation, message, fix, exit code."""

HEAD = """# Errors: what is said, who acts, what helps

An error is one panel on stderr: what is wrong, with the value and the bound that it broke, and what to do about it.
The command's exit code says who must act; `--debug` shows a traceback instead.

| exit code | who acts |
|---|---|
{codes}

Every situation on this page is brought about by a test (`tests/test_error_catalogue.py`), and the page is made of the
same table. In the messages, DIR is your directory, and `<...>` differs from case to case. [Commands](cli.md) has the
exit codes of everything else, [data](data.md) and [rewards](rewards.md) what files and graders should look like.
"""

WHO = {
    ConfigError: "You: change the run file or the command.",
    DataError: "You: change the data file, the model directory or the grader.",
    RunError: "You: the run's directory or disk does not allow it.",
    EngineError: "An inference engine failed: the panel and `miles logs --role engine` say why.",
    TrainerError: "A trainer rank failed: the panel and `miles logs --role trainer` say why.",
    Interrupted: "Nobody: the run was stopped on request, and the same command continues it.",
}


def page() -> str:
    """The whole page."""
    codes = "\n".join(f"| {kind.exit_code} | {who} |" for kind, who in WHO.items())
    return "\n".join(
        [
            HEAD.format(codes=codes),
            *_section(
                "The run file",
                "`miles config check` and `miles submit` tell all problems of a file at once, each with its line."
                " Nothing is started or written.",
                _config_rows(),
            ),
            *_section(
                "Data",
                "`miles submit` looks at the first problem of every step before it starts or writes anything. A step"
                " that reads what a `tiny-task` step builds is checked when it begins.",
                _input_rows(BAD_DATA),
            ),
            *_section("Models", "Told together with problems of the data.", _input_rows(BAD_MODELS)),
            *_section("Graders", "Told together with problems of the data.", _input_rows(BAD_GRADERS)),
            *_section(
                "Graders that fail while a run grades",
                'The step ends as below. With `on_error = "zero"`, a grader that raises or takes too long scores 0'
                " instead.",
                _rows(GRADING),
            ),
            *_section("The run directory", "Nothing is started or written.", _rows(DIRECTORY)),
            *_section(
                "While a run runs",
                "All processes of the step are ended, the attempt is in the ledger (`attempts.jsonl`, `miles status`)"
                " with the reason. Once the cause is gone, the same command continues the run: an sft or rl step from"
                " its checkpoint and its journal.",
                _rows(RUNNING),
            ),
        ]
    )


def _section(title: str, text: str, rows: Iterable[Row]) -> list[str]:
    lines = [f"| {name} | {_cell(message)} | {_cell(fix)} | {code} |" for name, message, fix, code in rows]
    return [f"## {title}\n", f"{text}\n", "| situation | message | fix | exit code |", "|---|---|---|---|", *lines, ""]


def _config_rows() -> Iterable[Row]:
    for name, (_, message, fix) in CASES.items():
        yield name, message, fix.removeprefix("fix: "), ConfigError.exit_code
    for name, (_, text) in (SYNTAX | FILES).items():
        message, _, fix = text.partition("\n  fix: ")
        yield name, message, fix, ConfigError.exit_code


def _input_rows(entries: Mapping[str, BadInput]) -> Iterable[Row]:
    for name, entry in entries.items():
        yield name, f"step '<name>': {entry.message}", entry.fix, DataError.exit_code


def _rows(entries: Mapping[str, Situation]) -> Iterable[Row]:
    for name, entry in entries.items():
        yield name, entry.message, entry.fix, entry.error.exit_code


def _cell(text: str) -> str:
    """Literal text in a cell of a table; two backticks, because messages name commands in one."""
    return f"`` {flat(text).replace('|', chr(92) + '|')} ``" if text else ""


if __name__ == "__main__":
    print(page(), end="")
