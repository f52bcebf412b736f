"""From files and overrides to complete steps, and back through the resolved file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from miles.config.load import dump_resolved, load_resolved, load_run
from miles.config.problems import InvalidConfigError
from miles.config.schema import Backend, EvalStep, ReportStep, RlStep, RunConfig, SftStep, TrainSection
from miles.errors import ConfigError, RunError

HEAD = 'name = "r"\nmodel = "hf"\ndata = "prompts.jsonl"\n'

WORKFLOW = """
name = "quick"

[train]
lr = 1e-5
dtype = "float32"

[[rewards]]
grader = "grader.py:score"
weight = 2
args = { scale = [1, 2], text = "step:is/no/reference" }

[steps.prepare]
kind = "tiny-task"

[steps.warmup]
kind = "sft"
model = "step:prepare/model"
data = "step:prepare/demonstrations.jsonl"
train.lr = 1e-3

[steps.train]
kind = "rl"
model = "step:warmup/model"
data = { path = "step:prepare/train.jsonl", prompt = "question", too_long = "drop" }
eval.data = "step:prepare/heldout.jsonl"

[steps.evaluate]
kind = "eval"
model = "step:train/model"
needs = ["warmup"]
eval.data = { path = "step:prepare/heldout.jsonl", prompt = "question" }

[steps.report]
kind = "report"
"""


def rl(config: RunConfig, name: str = "train") -> RlStep:
    step = config.steps[name]
    assert isinstance(step, RlStep)
    return step


def sft(config: RunConfig, name: str = "warmup") -> SftStep:
    step = config.steps[name]
    assert isinstance(step, SftStep)
    return step


def test_a_file_without_steps_is_a_training_and_a_report(write: Callable[..., Path]) -> None:
    config = load_run(write(HEAD))
    assert list(config.steps) == ["train", "report"]
    assert config.steps["report"] == ReportStep(kind="report", needs=["train"])
    assert rl(config).train == TrainSection()


def test_top_level_sections_are_defaults_beneath_each_steps_own(write: Callable[..., Path]) -> None:
    config = load_run(write(WORKFLOW))
    assert (sft(config).train.lr, rl(config).train.lr) == (1e-3, 1e-5)
    assert sft(config).train.dtype == rl(config).train.dtype == "float32"
    assert [reward.weight for reward in rl(config).rewards] == [2.0]


def test_references_and_reports_become_needs(write: Callable[..., Path]) -> None:
    config = load_run(write(WORKFLOW))
    assert {name: step.needs for name, step in config.steps.items()} == {
        "prepare": [],
        "warmup": ["prepare"],
        "train": ["warmup", "prepare"],
        "evaluate": ["warmup", "train", "prepare"],
        "report": ["prepare", "warmup", "train", "evaluate"],
    }


def test_held_out_data_is_read_like_the_training_data(write: Callable[..., Path]) -> None:
    config = load_run(write(WORKFLOW))
    heldout = rl(config).eval.data
    assert heldout is not None
    assert (heldout.path, heldout.prompt, heldout.too_long) == (
        "step:prepare/heldout.jsonl",
        "question",
        "error",
    )


def test_an_eval_step_reads_rows_like_the_top_level_data(write: Callable[..., Path]) -> None:
    text = 'name = "r"\nmodel = "hf"\n[data]\npath = "prompts.jsonl"\nlabel = "answer"\n'
    config = load_run(write(text + '[steps.e]\nkind = "eval"\neval.data = "prompts.jsonl"'))
    step = config.steps["e"]
    assert isinstance(step, EvalStep)
    assert step.eval.data is not None
    assert step.eval.data.label == "answer"


def test_paths_are_relative_to_the_file_that_they_stand_in(write: Callable[..., Path], folder: Path) -> None:
    write('model = "../hf"\n[[rewards]]\ngrader = "score.py:f"', "shared/base.toml")
    (folder / "shared" / "score.py").touch()
    text = 'name = "r"\nextends = "../shared/base.toml"\ndata = "../prompts.jsonl"\n'
    write(text + 'eval.data = "~/x/../held.jsonl"', "mine/run.toml")
    with pytest.raises(InvalidConfigError) as caught:
        load_run("mine/run.toml")
    (problem,) = caught.value.problems  # the one file that is not there
    assert str(Path("~/held.jsonl").expanduser()) in problem.message
    config = load_run("mine/run.toml", ["eval.data=prompts.jsonl"])
    assert rl(config).model.path == str(folder / "hf")
    assert rl(config).data.path == str(folder / "prompts.jsonl")
    assert rl(config).rewards[0].grader == f"{folder}/shared/score.py:f"


def test_a_linked_file_and_one_with_a_byte_order_mark_load(write: Callable[..., Path], folder: Path) -> None:
    target = write("\ufeff" + HEAD, "elsewhere/run.toml")
    Path("linked.toml").symlink_to(target)
    assert rl(load_run("linked.toml")).model.path == str(folder / "hf")


def test_module_graders_and_references_stay_as_they_are(write: Callable[..., Path], folder: Path) -> None:
    text = HEAD + '[[rewards]]\ngrader = "package.module:function"\n[[rewards]]\ngrader = "math"'
    assert [reward.grader for reward in rl(load_run(write(text))).rewards] == [
        "package.module:function",
        "math",
    ]
    assert sft(load_run(write(WORKFLOW))).model.path == "step:prepare/model"


def test_later_files_and_the_file_itself_have_the_last_word(write: Callable[..., Path]) -> None:
    write("[train]\nlr = 1.0\nsteps = 1\nbatch_size = 1", "a.toml")
    write("[train]\nlr = 2.0\nsteps = 2", "b.toml")
    config = load_run(write('extends = ["a.toml", "b.toml"]\n' + HEAD + "[train]\nlr = 3.0"))
    assert (rl(config).train.lr, rl(config).train.steps, rl(config).train.batch_size) == (3.0, 2, 1)


@pytest.mark.parametrize("preset", ["cpu", "dapo", "dr-grpo", "grpo"])
def test_every_preset_loads(preset: str, write: Callable[..., Path]) -> None:
    config = load_run(write(f'extends = "preset:{preset}"\n{HEAD}'))
    assert config != load_run(write(HEAD))


def test_presets_set_what_they_are_named_for(write: Callable[..., Path]) -> None:
    config = load_run(write('extends = ["preset:dapo", "preset:cpu"]\n' + HEAD))
    assert rl(config).algorithm.clip_high == 0.28
    assert rl(config).train.dtype == "float32"


def test_a_whole_number_is_a_number(write: Callable[..., Path]) -> None:
    assert rl(load_run(write(HEAD + "[train]\nlr = 1"))).train.lr == 1.0


def test_overrides_reach_every_step_that_does_not_set_the_key(write: Callable[..., Path]) -> None:
    config = load_run(write(WORKFLOW), ["train.lr=2e-6", "train.backend=fsdp", "name=other"])
    assert (sft(config).train.lr, rl(config).train.lr) == (1e-3, 2e-6)
    assert sft(config).train.backend is Backend.FSDP
    assert config.name == "other"


def test_an_override_of_one_step_reaches_that_step(write: Callable[..., Path]) -> None:
    config = load_run(write(WORKFLOW), ["steps.warmup.train.lr=0.5", "steps.train.rollout.stop=['a', 'b']"])
    assert (sft(config).train.lr, rl(config).train.lr) == (0.5, 1e-5)
    assert rl(config).rollout.stop == ["a", "b"]


def test_an_override_of_a_default_step_works_without_steps_in_the_file(write: Callable[..., Path]) -> None:
    assert rl(load_run(write(HEAD), ["steps.train.train.lr=0.5"])).train.lr == 0.5


def test_paths_in_overrides_are_relative_to_the_working_directory(write: Callable[..., Path], folder: Path) -> None:
    write(HEAD.replace('"hf"', '"../hf"').replace('"prompts', '"../prompts'), "deep/run.toml")
    assert rl(load_run("deep/run.toml", ["model=hf-moe"])).model.path == str(folder / "hf-moe")


OVERRIDES = {
    "shadowed": (
        ["train.lr=1.0"],
        "--set train.lr=1.0: train.lr reaches no step: warmup set it themselves",
        "fix: --set steps.warmup.train.lr=...",
    ),
    "no step has the section": (
        ["engine.kind=sglang"],
        "--set engine.kind=sglang: engine.kind reaches no step: none of prepare, warmup has a section engine",
        "fix: section engine belongs to steps of kind rl or eval",
    ),
    "unknown key": (
        ["train.lrr=1"],
        "--set train.lrr=1: train.lrr: unknown key 'lrr' in [train]. Did you mean 'lr'?",
        "fix: correct the spelling",
    ),
    "wrong type": (
        ["steps.warmup.train.lr=fast"],
        '--set steps.warmup.train.lr=fast: steps.warmup.train.lr = "fast" is a string: a number is wanted',
        "fix: for example the default, lr = 1e-06",
    ),
    "unknown step": (
        ["steps.warmpu.train.lr=1.0"],
        "--set steps.warmpu.train.lr=1.0: no step 'warmpu'. Did you mean 'warmup'?",
        "fix: the steps are prepare, warmup",
    ),
    "no equals sign": (["train.lr"], "--set train.lr: no '=' in it", "fix: write --set KEY=VALUE"),
    "extends": (
        ["extends=base.toml"],
        "--set extends=base.toml: a file extends others, not --set",
        "fix: write extends = ... into the file",
    ),
    "no key": (["=3"], "--set =3: '' is not a key", "fix: write --set KEY=VALUE"),
    "element of a list": (
        ["steps.warmup.needs.x=1"],
        "--set steps.warmup.needs.x=1: steps.warmup.needs is a list, which --set replaces whole",
        "fix: --set 'steps.warmup.needs=[...]'",
    ),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_an_override_that_cannot_work_says_so(case: str, write: Callable[..., Path]) -> None:
    path = write("""
name = "r"
[steps.prepare]
kind = "tiny-task"
[steps.warmup]
kind = "sft"
model = "step:prepare/model"
data = "step:prepare/demonstrations.jsonl"
needs = []
train.lr = 0.1
""")
    overrides, message, fix = OVERRIDES[case]
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    assert message in str(caught.value)
    assert fix in str(caught.value)


def test_the_last_of_two_overrides_of_a_key_counts(write: Callable[..., Path]) -> None:
    assert rl(load_run(write(HEAD), ["train.lr=1.0", "train.lr=2.0"])).train.lr == 2.0


def test_a_resolved_run_reads_back_equal(write: Callable[..., Path], folder: Path) -> None:
    config = load_run(write(WORKFLOW))
    (folder / "run").mkdir()
    (folder / "run" / "run.toml").write_text(dump_resolved(config))
    assert load_resolved(folder / "run") == config


def test_a_directory_without_a_resolved_run_is_refused(folder: Path) -> None:
    with pytest.raises(RunError, match=r"run\.toml: No such file or directory: not a run directory"):
        load_resolved(folder)


def test_a_resolved_run_that_was_damaged_is_refused(folder: Path) -> None:
    (folder / "run.toml").write_text('name = "r"\n[steps.a]\nkind = "rl"')
    with pytest.raises(RunError, match="not a resolved run of this version of Miles"):
        load_resolved(folder)


def test_configs_load_without_torch_numpy_or_transformers(write: Callable[..., Path]) -> None:
    program = (
        "import sys\n"
        "from miles.config.load import load_run\n"
        "import miles.config.explain, miles.config.template\n"
        f"load_run({str(write(HEAD).absolute())!r})\n"
        "heavy = {'torch', 'numpy', 'transformers', 'megatron', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
