"""The process of one trainer rank: `python -m miles.training.worker --run-dir D --step NAME`.

Started by the supervisor with torch.distributed's environment. Runs one `sft`, `rl` or `eval` step and leaves its
outputs under steps/NAME/. A MilesError ends it with that error's exit code and one readable block on stderr.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from contextlib import closing
from pathlib import Path

from miles.config.load import load_resolved
from miles.config.schema import EvalStep, RlStep, SftStep
from miles.errors import ConfigError
from miles.runs.claim import Fence
from miles.runs.failures import exit_with_failures
from miles.runs.parent import end_with_parent
from miles.runs.paths import RunPaths
from miles.training.context import Context
from miles.training.distributed import StopRequest, choose_device, process_group


def main() -> None:
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", required=True)
    arguments = parser.parse_args()

    # First of all: a request to stop must not kill a process that is still importing.
    stop = StopRequest.from_environment()
    quieten_libraries()
    paths = RunPaths(arguments.run_dir)
    config = load_resolved(arguments.run_dir)
    step = config.steps[arguments.step]
    device = choose_device(step.train.device) if isinstance(step, SftStep | RlStep) else choose_device("cpu")
    with process_group(device):
        context = Context(
            name=arguments.step,
            seed=config.seed,
            run_name=config.name,
            paths=paths,
            device=device,
            stop=stop,
            attempt=int(os.environ["MILES_ATTEMPT"]),
            fence=Fence.from_environment(paths),
            engines_file=Path(os.environ["MILES_ENGINES_FILE"]),
        )
        run_step(context, step)


def quieten_libraries() -> None:
    """Keep the log to what a reader can act on: no hints at absent accelerators' packages, no progress bars."""
    import transformers

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.")
    transformers.utils.logging.disable_progress_bar()


def run_step(context: Context, step: object) -> None:
    """Run one step of a kind that has ranks. Heavy modules are imported for the kind that needs them."""
    match step:
        case SftStep():
            from miles.training.sft import train_supervised

            train_supervised(context, step)
        case RlStep():
            from miles.training.loop import train
            from miles.training.rl import ReinforcementLearning

            with closing(ReinforcementLearning(context, step)) as run:
                train(run)
        case EvalStep():
            from miles.training.evaluation import evaluate_step

            evaluate_step(context, step)
        case _:
            raise ConfigError(f"step '{context.name}' of kind '{getattr(step, 'kind', '?')}' has no ranks")


if __name__ == "__main__":
    exit_with_failures(main)
