"""The model's weights under the names of its safetensors file: read, replace, hash.

transformers may hold them fused (experts' gate and up in one parameter); this is the only place that knows. Runs on the
engine's thread. Every replacement is checked as a whole before anything is written, so a refused one changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from megasapo.checksum import Checksum


class WeightError(ValueError):
    """Weights were refused; the message says which and why. The old ones are intact."""


class Weights:
    """Views of the model's parameters by HF file name; writing to a view changes the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._views = file_views(model)
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        self._aliases = {name: source for name, source in tied.items() if name in self._views}
        self.names = [name for name in self._views if name not in self._aliases]

    def get(self, name: str) -> torch.Tensor:
        """The tensor itself, not a copy. Raises WeightError for an unknown name, listing the nearest."""
        view = self._views.get(name)
        if view is None:
            near = get_close_matches(name, self._views, n=3, cutoff=0.5)
            raise WeightError(f"unknown weight {name!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
        return view

    def check(self, name: str, shape: Iterable[int]) -> None:
        view = self.get(name)
        if list(view.shape) != list(shape):
            raise WeightError(f"weight {name!r} has shape {list(shape)}, the model's has {list(view.shape)}")

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the named tensors, converted to the model's dtype; all names and shapes are checked first."""
        checked = list(tensors)
        for name, tensor in checked:
            self.check(name, tensor.shape)
        for name, tensor in checked:
            self.get(name).copy_(tensor)

    def load(self, directory: str) -> None:
        """Replace all weights by those of an HF directory. Raises WeightError, before writing, unless all fit."""
        shards = _shards(Path(directory))
        try:
            found = {name: shape for shard in shards for name, shape in _header(shard)}
            for name, shape in found.items():
                self.check(name, shape)
            missing = [name for name in self.names if name not in found]
            if missing:
                raise WeightError(f"{directory} lacks {len(missing)} weights, the first is {missing[0]!r}")
            for shard in shards:
                with safe_open(shard, framework="pt") as f:
                    for name in f.keys():  # noqa: SIM118  safe_open is not a mapping
                        self.get(name).copy_(f.get_tensor(name))
        except (OSError, SafetensorError) as e:
            raise WeightError(f"{directory}: cannot read the weights: {e}") from e

    def checksum(self) -> str:
        """megasapo.checksum over the names that a file of this model has."""
        total = Checksum()
        for name in self.names:
            total.add(name, self._views[name])
        return total.hexdigest()


def _shards(directory: Path) -> list[Path]:
    """The safetensors files, by the index where there is one. All of them exist."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise WeightError(f"{index}: not a safetensors index: {e!r}") from e
        shards = [directory / name for name in names]
    else:
        shards = [directory / "model.safetensors"]
    absent = [str(s) for s in shards if not s.is_file()]
    if absent:
        raise WeightError(f"no such weights: {', '.join(absent)}")
    return shards


def _header(shard: Path) -> Iterator[tuple[str, list[int]]]:
    with safe_open(shard, framework="pt") as f:
        for name in f.keys():  # noqa: SIM118
            yield name, f.get_slice(name).get_shape()


def file_views(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """HF file name -> view of the parameter (or part of it) that holds it.

    transformers can only produce file-named copies. So each parameter is replaced by a tensor that numbers its own
    elements, transformers renames and splits those, and the numbers say which part of which parameter each name is.
    """
    views: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    for part in _by_layer(state):
        offsets: dict[str, int] = {}
        numbered: dict[str, torch.Tensor] = {}
        total = 0
        for name in part:
            size = state[name].numel()
            offsets[name] = total
            numbered[name] = torch.arange(total, total + size).view(state[name].shape)
            total += size
        for file_name, numbers in revert_weight_conversion(model, numbered).items():
            first = int(numbers.flatten()[0])
            owner = max((n for n in part if offsets[n] <= first), key=lambda n: offsets[n])
            views[file_name] = _view(state[owner], numbers - offsets[owner], file_name)
    return views


def _by_layer(state: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names grouped by layer, so that numbering needs memory for one layer only."""
    groups: dict[str, list[str]] = {}
    for name in state:
        layer = re.match(r"(.*?\.\d+)\.", name)
        groups.setdefault(layer.group(1) if layer else "", []).append(name)
    yield from groups.values()


def _view(parameter: torch.Tensor, numbers: torch.Tensor, name: str) -> torch.Tensor:
    """The part of `parameter` whose elements, counted in row-major order, are `numbers`."""
    first = int(numbers.flatten()[0])
    steps = [numbers.select(d, min(1, size - 1)).flatten()[0] for d, size in enumerate(numbers.shape)]
    strides = [int(step) - first or 1 for step in steps]
    if not parameter.is_contiguous():
        raise NotImplementedError(f"{name}: its parameter is not contiguous in memory")
    last = first + sum(s * (n - 1) for s, n in zip(strides, numbers.shape, strict=True))
    expected = torch.tensor(first)  # of the size of this weight, not of a parameter that holds all experts
    for stride, size in zip(strides, numbers.shape, strict=True):
        expected = expected.unsqueeze(-1) + torch.arange(size) * stride
    if last >= parameter.numel() or min(strides, default=1) < 0 or not torch.equal(expected, numbers):
        raise NotImplementedError(f"{name}: transformers does not hold this weight as a view of a parameter")
    return parameter.as_strided(numbers.shape, strides, parameter.storage_offset() + first)
