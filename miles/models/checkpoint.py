"""Hugging Face model directories: reading single tensors or parts of them, and writing a whole directory.

Owns the file layout (safetensors, index, config, tokenizer). What the tensors mean belongs to their users.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from miles.errors import DataError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 4 * 2**30
"""A written shard is closed when it is at least this large."""
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
)


class CheckpointReader:
    """Opens the safetensors files of a directory when they are first needed; a context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}
        self._file_of = _weight_map(directory)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> torch.Tensor:
        """The given part of a tensor, on the CPU; `DataError` when it is missing or its shape is not `shape`."""
        if name not in self._file_of:
            raise DataError(
                f"{self.directory} has no weight {name!r}, which its config.json calls for",
                fix="the directory is incomplete or its config.json belongs to another model",
            )
        stored = self._open(self._file_of[name]).get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise DataError(
                f"{name!r} in {self.directory} has the shape {tuple(stored.get_shape())}; "
                f"its config.json calls for {shape}",
                fix="the weights and the config.json belong to different models",
            )
        tensor: torch.Tensor = stored[part]
        return tensor

    def check(self) -> None:
        """Open every file, reading no tensor; `DataError` for one that cannot be read or lacks a tensor."""
        for file in sorted(set(self._file_of.values())):
            present = set(self._open(file).keys())
            missing = sorted(name for name, where in self._file_of.items() if where == file and name not in present)
            if missing:
                raise DataError(
                    f"{self.directory / file} has no weight {missing[0]!r}, which {INDEX} says is there",
                    fix="copy the model again: its files belong to different models",
                )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.directory / file, "pt")
            except (OSError, SafetensorError) as error:
                raise DataError(f"cannot read {self.directory / file}: {error}", fix="copy the file again") from error
        return self._files[file]


def check_weights(directory: Path) -> None:
    """Raise DataError where a weight file is missing, cut off or damaged, or lacks tensors that the index promises."""
    with CheckpointReader(directory) as reader:
        reader.check()


def _weight_map(directory: Path) -> dict[str, str]:
    """File of each tensor."""
    index = directory / INDEX
    if index.is_file():
        return _read_index(index)
    if not (directory / SINGLE).is_file():
        raise DataError(
            f"{directory} has neither {SINGLE} nor {INDEX}",
            fix="point to a Hugging Face model directory with safetensors weights",
        )
    try:
        with safe_open(directory / SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except SafetensorError as error:
        raise DataError(f"cannot read {directory / SINGLE}: {error}", fix="copy the file again") from error


def _read_index(index: Path) -> dict[str, str]:
    fix = "copy the file again"
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except ValueError as error:
        raise DataError(f"{index} is not JSON: {error}", fix=fix) from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{index} has no weight_map", fix=fix) from error
    missing = sorted(file for file in set(weight_map.values()) if not (index.parent / file).is_file())
    if missing:
        raise DataError(
            f"{index.parent} lacks {', '.join(missing)}, which {INDEX} names", fix="finish the download of the model"
        )
    return dict(weight_map)


def write_model(directory: Path, weights: Iterable[tuple[str, torch.Tensor]], source: Path, dtype: torch.dtype) -> None:
    """Write `weights` (whole tensors, checkpoint names) as a model directory that `from_pretrained` opens.

    Everything else (config, tokenizer, chat template, generation config, remote code) is copied from
    `source`. config.json is written last: a directory without it is unfinished. One shard is held in memory.
    Raises OSError as the disk does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(directory, weights)
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, directory / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    partial = directory / "config.json.partial"
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for weights_file in directory.glob("*.safetensors"):
        shutil.copymode(partial, weights_file)  # safetensors makes files that only their owner can read
    partial.replace(directory / "config.json")


def _write_weights(directory: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = 0
    for name, tensor in weights:
        # A copy: the next tensor may reuse the memory of this one, and views of one storage cannot be saved.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        total += pending[name].nbytes
        if sum(value.nbytes for value in pending.values()) >= SHARD_BYTES:
            shards.append(_flush(directory, pending, len(shards)))
    if pending:
        shards.append(_flush(directory, pending, len(shards)))
    if len(shards) == 1:
        _unfinished(directory, 0).replace(directory / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _unfinished(directory, number).replace(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _flush(directory: Path, pending: dict[str, torch.Tensor], number: int) -> list[str]:
    file = _unfinished(directory, number)
    try:
        save_file(pending, file, metadata={"format": "pt"})
    except SafetensorError as error:
        refusal = re.search(r"\(os error (\d+)\)", str(error))
        if refusal is None:
            raise
        code = int(refusal[1])
        raise OSError(code, os.strerror(code), str(file)) from error
    names = list(pending)
    pending.clear()
    return names


def _unfinished(directory: Path, number: int) -> Path:
    return directory / f"model-{number + 1:05d}.safetensors.partial"
