"""The process of a step without ranks: `python -m miles.workflow.run_step --run-dir D --step NAME`.

Runs `tiny-task` and `report` steps. Heavy modules are imported for the kind that needs them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from miles.config.load import load_resolved
from miles.config.schema import ReportStep, TinyTaskStep
from miles.errors import ConfigError
from miles.runs.failures import exit_with_failures
from miles.runs.parent import end_with_parent
from miles.runs.paths import RunPaths


def main() -> None:
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", required=True)
    arguments = parser.parse_args()

    config = load_resolved(arguments.run_dir)
    step = config.steps[arguments.step]
    match step:
        case TinyTaskStep():
            from miles.models.tiny import build_tiny_task

            build_tiny_task(step, RunPaths(arguments.run_dir).step(arguments.step), config.seed)
        case ReportStep():
            from miles.reports.html import write_report

            write_report(arguments.run_dir)
        case _:
            raise ConfigError(f"step '{arguments.step}' of kind '{step.kind}' runs on ranks")


if __name__ == "__main__":
    exit_with_failures(main)
