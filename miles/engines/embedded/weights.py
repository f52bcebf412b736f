"""The model's weights under their Hugging Face checkpoint names: update, checksum, release.

transformers may hold a checkpoint's tensors in another form (all experts of a layer stacked, gate and up projection
joined). `CheckpointWeights` shows every tensor under the name and shape that it has in a model directory, as a view
of the model's own memory, so that trainer and engine speak about the same thing.

Owns no HTTP and decides nothing about running requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from miles.errors import EngineError, did_you_mean
from miles.sync.checksum import checksum


class WeightUpdateError(EngineError):
    """An update that was refused; the weights are as they were, unless the message says otherwise."""


class CheckpointWeights:
    """All weights of `model` by checkpoint name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        self._bytes = {pointer: storage.nbytes() for pointer, storage in self._storages.items()}
        self._views: dict[str, torch.Tensor] = {}
        self._aliases: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict().items():
            # A tied weight comes once, under its first name; its other names are accepted in updates.
            target = self._aliases if tensor.data_ptr() in seen else self._views
            seen.add(tensor.data_ptr())
            target.update(checkpoint_views(model, name, tensor))

    def update(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors into the model, cast to its type. Nothing is copied when a name or shape is wrong."""
        pairs = [(self._find(name, tensor), tensor) for name, tensor in named]
        for view, tensor in pairs:
            view.copy_(tensor)

    def update_from_disk(self, directory: Path) -> None:
        """Copy all weights of a model directory into the model; every weight must be there."""
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise WeightUpdateError(f"{directory} holds no safetensors files")
        try:
            names = {name for file in files for name in _names(file)}
            missing = sorted(self._views.keys() - names)
            if missing:
                raise WeightUpdateError(f"{directory} lacks {len(missing)} weights, first {missing[0]}")
            for file in files:
                self.update(_read(file))
        except SafetensorError as error:
            raise WeightUpdateError(f"cannot read the weights in {directory}: {error}") from error

    def checksums(self) -> dict[str, str]:
        """`miles.sync.checksum` of every tensor."""
        return {name: checksum(view) for name, view in self._views.items()}

    def release(self) -> None:
        """Give the memory of all weights back; until `resume` the model must not run."""
        for storage in self._storages.values():
            storage.resize_(0)

    def resume(self) -> None:
        """Take memory again. The weights are zeros until they are pushed."""
        for pointer, storage in self._storages.items():
            storage.resize_(self._bytes[pointer])
            torch.empty(0, dtype=torch.uint8).set_(storage).zero_()

    def _find(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        view = self._views.get(name, self._aliases.get(name))
        if view is None:
            raise WeightUpdateError(f"this model has no weight '{name}'.{did_you_mean(name, self._views)}")
        if view.shape != tensor.shape:
            raise WeightUpdateError(f"'{name}' has shape {list(view.shape)} here; {list(tensor.shape)} was sent")
        return view


def checkpoint_views(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The checkpoint tensors that the model's `tensor` consists of, by checkpoint name, as views of it.

    transformers' own inverse conversion is applied to the numbers of the elements; their pattern tells offset and
    strides of each part. EngineError when a part is not a view.
    """
    numbers = torch.arange(tensor.numel()).view(tensor.shape)
    parts = revert_weight_conversion(model, {name: numbers})
    return {part: _view(tensor, where, part) for part, where in parts.items()}


def _view(tensor: torch.Tensor, where: torch.Tensor, name: str) -> torch.Tensor:
    """The view of `tensor` whose elements have the numbers `where`."""
    flat = where.reshape(-1)
    origin = int(flat[0])
    strides = [
        int(where.select(axis, 1).reshape(-1)[0]) - origin if size > 1 else 1 for axis, size in enumerate(where.shape)
    ]
    grid = torch.full((), origin)
    for size, stride in zip(where.shape, strides, strict=True):
        grid = grid[..., None] + torch.arange(size) * stride
    if not torch.equal(grid.view(where.shape), where):
        raise EngineError(f"the embedded engine cannot update '{name}': this model stores it rearranged")
    return tensor.detach().as_strided(where.shape, strides, tensor.storage_offset() + origin)


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _read(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 -- not a dict
            yield name, opened.get_tensor(name)
