"""A container without an image, or with one that is not there, is refused with the run file."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.config.load import load_run
from miles.config.problems import InvalidConfigError

HEAD = 'name = "r"\nmodel = "hf"\ndata = "prompts.jsonl"\n[container]\n'


def problems(text: str) -> list[str]:
    Path("run.toml").write_text(HEAD + text)
    with pytest.raises(InvalidConfigError) as caught:
        load_run("run.toml")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.usefixtures("folder")
def test_a_runtime_needs_an_image() -> None:
    (problem,) = problems('runtime = "apptainer"\n')
    assert problem.startswith('run.toml:5: container.runtime = "apptainer" needs container.image')
    assert "miles container build" in problem


def test_a_missing_image_is_named_with_its_neighbour(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "miles.sif").touch()
    (problem,) = problems('runtime = "apptainer"\nimage = "images/mile.sif"\n')
    assert f'run.toml:6: container.image = "{folder}/images/mile.sif": no such file or directory.' in problem
    assert "Did you mean 'miles.sif'?" in problem


def test_an_image_is_relative_to_the_run_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "miles.sif").touch()
    Path("run.toml").write_text(HEAD + 'runtime = "apptainer"\nimage = "miles.sif"\n')
    monkeypatch.chdir("/")
    config = load_run(folder / "run.toml")
    assert {step.container.image for step in config.steps.values()} == {str(folder / "miles.sif")}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("runtime", "image"), [("enroot", "miles"), ("apptainer", "docker://org/miles:1"), ("none", "not/there.sif")]
)
def test_what_the_runtime_looks_up_itself_is_left_alone(runtime: str, image: str) -> None:
    Path("run.toml").write_text(HEAD + f'runtime = "{runtime}"\nimage = "{image}"\n')
    (step, *_) = load_run("run.toml").steps.values()
    assert step.container.image is not None and step.container.image.endswith(image)
