"""The files that a step names: model directory, tokenizer, data, grader's file, template, image. Are they there?

Owns existence and form. What a model allows is `miles.config.model_checks`, what is in the data `miles.data`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from miles.config.cluster import ContainerSection, SlurmSection
from miles.config.problems import Finding
from miles.config.schema import EvalStep, ModelSection, RlStep, SftStep, StepBase
from miles.errors import did_you_mean

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def file_findings(step: StepBase) -> Iterator[Finding]:
    """Files of one step that are missing or are not what they should be."""
    yield from _template(step.slurm)
    yield from _image(step.container)
    if isinstance(step, SftStep | RlStep | EvalStep):
        yield from _model_directory(step.model)
    if isinstance(step, SftStep | RlStep):
        yield from _data_file(step.data.path, "data")
    if isinstance(step, RlStep | EvalStep):
        if step.eval.data is not None:
            yield from _data_file(step.eval.data.path, "eval", "data")
        for index, reward in enumerate(step.rewards):
            file = reward.grader.partition(":")[0]
            if file.endswith(".py") and (reason := _not_a_file(Path(file))):
                message = f'rewards[{index}].grader = "{reward.grader}": {reason}'
                fix = "correct the path; it is relative to the run file"
                yield Finding((("rewards", index, "grader"),), message, fix)


def _template(slurm: SlurmSection) -> Iterator[Finding]:
    if slurm.template is not None and (reason := _not_a_file(Path(slurm.template))):
        message = f'slurm.template = "{slurm.template}": {reason}'
        yield Finding((("slurm", "template"),), message, "correct the path; it is relative to the run file")


def _image(container: ContainerSection) -> Iterator[Finding]:
    image, key = container.image, ("container", "image")
    if container.runtime == "none":
        return
    if not image:
        message = f'container.runtime = "{container.runtime}" needs container.image'
        fix = 'name the image; `miles container build IMAGE` makes one; runtime = "none" runs without'
        yield Finding((("container", "runtime"), key), message, fix)
    elif not is_looked_up(container) and not Path(image).exists():
        message = f'container.image = "{image}": no such file or directory.{_hint(Path(image))}'
        yield Finding((key,), message, f"correct the path, or make it: `miles container build {image}`")


def is_looked_up(container: ContainerSection) -> bool:
    """Whether the runtime finds the image itself: an address, or a container that Enroot knows by name."""
    image = container.image or ""
    return "://" in image or (container.runtime == "enroot" and "/" not in image)


def _model_directory(model: ModelSection) -> Iterator[Finding]:
    if not model.path.startswith("step:"):
        yield from _checkpoint(Path(model.path))
    if model.tokenizer is not None:
        yield from _tokenizer("tokenizer", model.tokenizer)
    elif _is_file(Path(model.path) / "config.json"):
        yield from _tokenizer("path", model.path)


def _tokenizer(key: str, path: str) -> Iterator[Finding]:
    if path.startswith("step:") or any(_is_file(Path(path) / file) for file in TOKENIZER_FILES):
        return
    what = "has no tokenizer" if Path(path).is_dir() else "no such directory"
    yield Finding(
        (("model", key),),
        f'model.{key} = "{path}": {what}',
        f"name a directory with a tokenizer in model.tokenizer (one of {', '.join(TOKENIZER_FILES)})",
    )


def _checkpoint(directory: Path) -> Iterator[Finding]:
    given = f'model.path = "{directory}"'

    def finding(what: str, fix: str) -> Finding:
        return Finding((("model", "path"),), f"{given}: {what}", fix)

    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if directory.is_dir():
            yield finding("has no config.json", "name the directory of a Hugging Face model")
        else:
            is_file = isinstance(error, NotADirectoryError)
            yield finding(
                "is a file, not a directory" if is_file else "no such directory." + _hint(directory),
                "name a Hugging Face model directory; `hf download ORG/NAME --local-dir DIR` makes one",
            )
        return
    except OSError as error:
        yield finding(f"config.json cannot be read: {error.strerror}", "check its permissions")
        return
    except ValueError as error:
        yield finding(f"config.json is not valid JSON: {error}", "copy the model anew")
        return
    if not isinstance(config, dict):
        yield finding("config.json is not a JSON object", "copy the model anew")
    if not any(directory.glob("*.safetensors")):
        yield finding("has no weights (*.safetensors)", "finish the download, or save it as safetensors")


def _is_file(path: Path) -> bool:
    """Whether `path` is a file that can be seen; in a directory without permission none can."""
    try:
        return path.is_file()
    except OSError:
        return False


def _hint(path: Path) -> str:
    """The nearest name beside a path that does not exist."""
    try:
        return did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return ""  # its directory is missing or unreadable as well: nothing to suggest


def _not_a_file(path: Path) -> str | None:
    """Why `path` cannot be a file to read, or None when it is one."""
    try:
        if path.is_file():
            return None
        return "is a directory, not a file" if path.is_dir() else "no such file." + _hint(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _data_file(path: str, *section: str) -> Iterator[Finding]:
    if not path.startswith("step:") and (reason := _not_a_file(Path(path))):
        message = f'{".".join(section)}.path = "{path}": {reason}'
        yield Finding(((*section, "path"),), message, "correct the path; it is relative to the run file")
