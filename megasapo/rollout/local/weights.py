"""The model's weights under the names of its safetensors file: read, replace, hash.

transformers may hold them fused (experts' gate and up in one parameter); this is the only place that knows. Runs on the
engine's thread. Every replacement is checked as a whole before anything is written, so a refused one changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from megasapo.checksum import Checksum
from megasapo.errors import UserError
from megasapo.fp8.blocks import SCALE, WEIGHT_BLOCK, dequantise_blocks
from megasapo.fp8.formats import E4M3
from megasapo.hf_files import HFFiles, TensorSpec


class WeightError(UserError, ValueError):
    """Weights were refused; the message says which and why. The old ones are intact."""


@dataclass(frozen=True, slots=True)
class Fp8:
    """One quantised weight as it was received."""

    values: torch.Tensor  # [M, N] e4m3
    scale_inv: torch.Tensor  # [ceil(M / 128), ceil(N / 128)] float32


class Weights:
    """Views of the model's parameters by HF file name; writing to a view changes the model.

    Of a quantised model the parameters hold the products of values and scales; both are kept as they came, and a
    parameter follows as soon as there are new ones of both.
    """

    def __init__(self, model: PreTrainedModel, fp8_names: Iterable[str] = ()) -> None:
        """`fp8_names`: of the weights that come as e4m3 with scales."""
        self._views = file_views(model)
        self._num_layers: int = model.config.get_text_config().num_hidden_layers
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        self._aliases = {name: source for name, source in tied.items() if name in self._views}
        self._half: dict[str, str] = {}  # quantised weights of which one part is new -> the part that is not
        self._stored = dict(self._views)  # what came under each name
        self._fp8 = {name: _empty_fp8(self.get(name)) for name in fp8_names}
        for name, fp8 in self._fp8.items():
            self._stored |= {name: fp8.values, name + SCALE: fp8.scale_inv}
        self.names = [name for name in self._stored if name not in self._aliases]

    def get(self, name: str) -> torch.Tensor:
        """What is held under the name, not a copy. Raises WeightError for an unknown name, listing the nearest."""
        held = self._stored.get(name)
        if held is None:
            if name.endswith(SCALE) and name.removesuffix(SCALE) in self._views:
                raise WeightError(f"{name!r}: {name.removesuffix(SCALE)!r} is not quantised in this server's model")
            near = get_close_matches(name, self._stored, n=3, cutoff=0.5)
            raise WeightError(f"unknown weight {name!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
        return held

    def check(self, name: str, shape: Iterable[int], dtype: torch.dtype) -> None:
        held = self.get(name)
        if list(held.shape) != list(shape):
            raise WeightError(f"weight {name!r} has shape {list(shape)}, the model's has {list(held.shape)}")
        if (name.removesuffix(SCALE) in self._fp8 or dtype is E4M3.dtype) and held.dtype is not dtype:
            raise WeightError(
                f"weight {name!r} is {_short(dtype)}, this server's is {_short(held.dtype)}: does the learner's "
                "rollout.quantization fit the model that the server was started with?"
            )

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the named tensors, converted to the model's dtype; all names and shapes are checked first."""
        checked = list(tensors)
        for name, tensor in checked:
            self.check(name, tensor.shape, tensor.dtype)
            if name.endswith(SCALE):
                _check_scales(name, tensor)
        for name, tensor in checked:
            self._put(name, tensor)

    def begin(self) -> None:
        """Forget what an earlier update left unfinished: this one brings all of it."""
        self._half.clear()

    def end(self) -> None:
        """Raises WeightError when values came without their scales, or scales without values, since `begin`."""
        if self._half:
            name, lacking = next(iter(self._half.items()))
            self._half.clear()
            raise WeightError(f"weight {name!r} was updated without {lacking!r}")

    def load(self, directory: str) -> None:
        """Replace all weights by those of an HF directory. Raises WeightError, before writing, unless all fit.

        BridgeError where they cannot be read.
        """
        files = HFFiles(directory)
        found = served_specs(files, self._num_layers)
        for name, spec in found.items():
            self.check(name, spec.shape, spec.dtype)
        missing = [name for name in self.names if name not in found]
        if missing:
            raise WeightError(f"{directory} lacks {len(missing)} weights, the first is {missing[0]!r}")
        for name in found:
            if name.endswith(SCALE):
                _check_scales(name, files.read(name))
        self.begin()
        for name in found:
            self._put(name, files.read(name))

    def checksum(self) -> str:
        """megasapo.checksum over the names that a file of this model has."""
        total = Checksum()
        for name in self.names:
            total.add(name, self._stored[name])
        return total.hexdigest()

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        self._stored[name].copy_(tensor)
        weight = name.removesuffix(SCALE)
        fp8 = self._fp8.get(weight)
        if fp8 is None:
            return
        if self._half.get(weight) == name:
            del self._half[weight]
            self._views[weight].copy_(dequantise_blocks(fp8.values, fp8.scale_inv, dtype=self._views[weight].dtype))
        else:
            self._half[weight] = weight if name != weight else weight + SCALE


def _empty_fp8(view: torch.Tensor) -> Fp8:
    blocks = [-(-size // side) for size, side in zip(view.shape, WEIGHT_BLOCK, strict=True)]
    values = torch.empty(view.shape, dtype=E4M3.dtype, device=view.device)
    return Fp8(values, torch.empty(blocks, dtype=torch.float32, device=view.device))


def _check_scales(name: str, scales: torch.Tensor) -> None:
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise WeightError(f"weight {name!r} holds scales that are not positive numbers")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def served_specs(files: HFFiles, num_layers: int) -> dict[str, TensorSpec]:
    """Of an HF directory's weights, those of the model: not of layers after its last, for multi-token prediction."""
    layers = {name: re.match(r"model\.layers\.(\d+)\.", name) for name in files.names}
    return {name: files.spec(name) for name, layer in layers.items() if layer is None or int(layer[1]) < num_layers}


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


def _by_layer(state: dict[str, torch.Tensor]) -> list[list[str]]:
    """Names grouped by layer, so that numbering needs memory for one layer only."""
    groups: dict[str, list[str]] = {}
    for name in state:
        layer = re.match(r"(.*?\.\d+)\.", name)
        groups.setdefault(layer.group(1) if layer else "", []).append(name)
    return list(groups.values())


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
