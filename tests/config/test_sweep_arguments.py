"""`--sweep`: which runs it means, and what is refused."""

from pathlib import Path

import pytest

from miles.config.sweep import MAX_NAME, load_sweep, parse_axis
from miles.errors import ConfigError
from tests.two_stages import STEPS

RUN = f"""
name = "demo"
{STEPS}"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    return file


def test_every_combination_is_a_run_named_after_its_values(file: Path) -> None:
    sweep = load_sweep(file, ["train.steps=7"], ["seed=0,1", "steps.grpo.train.lr=1e-5,3e-5"])
    assert [(run.name, run.seed, run.steps["grpo"].train.lr) for run in sweep.members] == [
        ("demo-seed-0-lr-1e-5", 0, 1e-5),
        ("demo-seed-0-lr-3e-5", 0, 3e-5),
        ("demo-seed-1-lr-1e-5", 1, 1e-5),
        ("demo-seed-1-lr-3e-5", 1, 3e-5),
    ]
    assert all(run.steps["warmup"].train.steps == 7 for run in sweep.members)
    assert sweep.directory == Path("runs/demo.sweep").absolute()
    assert load_sweep(file, ['name="other"'], ["seed=5"]).members[0].name == "other-seed-5"


@pytest.mark.parametrize(
    ("argument", "values", "labels"),
    [
        ("train.lr=1e-5, -2", ("1e-5", "-2"), ["-lr-1e-5", "-lr--2"]),
        ("engine.extra_args=['a,b'],['c']", ("['a,b']", "['c']"), ["-extra_args-a-b", "-extra_args-c"]),
        ('train.backend="fsdp",megatron', ('"fsdp"', "megatron"), ["-backend-fsdp", "-backend-megatron"]),
        ("model.path=/data/a b,c", ("/data/a b", "c"), ["-path-data-a-b", "-path-c"]),
    ],
)
def test_values_are_split_at_their_own_commas(argument: str, values: tuple[str, ...], labels: list[str]) -> None:
    axis = parse_axis(argument)
    assert (axis.values, axis.labels()) == (values, labels)


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (["seed"], "--sweep seed: no '=' in it"),
        (["seed="], "--sweep seed=: a value is missing"),
        (["seed=0,,1"], "a value is missing"),
        (["a b=1"], "'a b' is not a key"),
        (["seed=1,2,1"], "the value 1 is there twice"),
        (["seed=1", "seed=2"], "give one key twice"),
        (["train.lr=1", "train={lr=1}"], "give one key twice"),
        (["train.steps=3,4"], "--sweep train.steps=3,4 and --set train.steps=7 give one key twice"),
        (["name=a,b"], "all runs of a sweep have the same name"),
        (["runs_dir=a,b"], "the same runs_dir"),
        (["slurm.time=1,2"], "one set of options"),
        (["steps.grpo.slurm.time=1,2"], "one set of options"),
        (["steps.grop.train.lr=1,2"], "--sweep steps.grop.train.lr=1: no step 'grop'. Did you mean 'grpo'?"),
        (["data.system=a b,a-b"], "2 runs would be called 'demo-system-a-b'"),
        ([f"data.system={'x' * MAX_NAME},y"], f"at most {MAX_NAME}"),
        (["seed=" + ",".join(map(str, range(50))), "rollout.group_size=" + ",".join(map(str, range(50)))], "2500 runs"),
    ],
)
def test_what_is_no_sweep_is_refused(file: Path, sweeps: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(file, ["train.steps=7"], sweeps)
    assert message in caught.value.message
    assert caught.value.fix


def test_mistakes_are_told_with_the_value_that_makes_them(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"--sweep sead=0: .*unknown key 'sead'.* Did you mean 'seed'\?"):
        load_sweep(file, [], ["sead=0,1"])
    with pytest.raises(ConfigError, match=r"--sweep steps\.grpo\.train\.lr=-1: .* must be > 0"):
        load_sweep(file, [], ["steps.grpo.train.lr=1,-1"])
