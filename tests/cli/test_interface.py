"""The commands and options are a promise to scripts: `interface.txt` is what they are.

When a change is meant, write the file anew: `python tests/cli/test_interface.py`.
"""

from pathlib import Path

import typer.main

from miles.cli.main import app

GOLDEN = Path(__file__).with_name("interface.txt")


def describe() -> str:
    """One line per command and per parameter."""
    lines: list[str] = []

    def visit(name: str, command) -> None:
        lines.append(name)
        for parameter in command.params:
            words = [parameter.param_type_name, "/".join([*parameter.opts, *parameter.secondary_opts])]
            words += ["required"] * parameter.required + ["repeatable"] * parameter.multiple
            lines.append("    " + " ".join(words))
        for child in sorted(getattr(command, "commands", {})):
            visit(f"{name} {child}", command.commands[child])

    visit("miles", typer.main.get_command(app))
    return "\n".join(lines) + "\n"


def test_commands_and_options_are_the_recorded_ones() -> None:
    assert describe() == GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text(describe())
