"""What the output head does to rows of logits between its matrix products: sums in forward, gradients in backward.

head.py calls the kernel that model.py has chosen with `choose_kernel`. The torch kernel is the reference and runs on
any device; head_triton.py has the same two functions for CUDA. Nothing here knows of ranks, chunks or autograd.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megasapo.config import ConfigError

KERNELS = ("torch", "triton")
# Rows worked on together, in logits: on a CPU few enough to stay in its cache from one operator to the next.
BLOCK_LOGITS = {"cpu": 2**18, "cuda": 2**26}


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The gradient of z is factor * (e * (slope * (z - highest) + offset) + change at the target), e = e^(z - highest).

    [n] each, of type `wide`; without slope and offset these are 0 and 1. `factor` is left to the other sides of the
    matrix products that follow. From d logp / dz = onehot - p and d entropy / dz = -p * (log p + entropy).
    """

    factor: Tensor
    highest: Tensor
    change: Tensor
    slope: Tensor | None = None
    offset: Tensor | None = None

    def of(self, rows: slice | Tensor) -> Coefficients:
        slope = self.slope[rows] if self.slope is not None else None
        offset = self.offset[rows] if self.offset is not None else None
        return Coefficients(self.factor[rows], self.highest[rows], self.change[rows], slope, offset)


class RowKernel(Protocol):
    def sums(self, z: Tensor, column: Tensor, temperature: float, with_entropy: bool) -> Tensor:
        """[4, n] of type `wide`: the highest h of a row, sum e^(z-h), z of the row's column, sum (z-h) e^(z-h).

        z [n, V] is divided by the temperature first, and may be overwritten; column [n] int64. The last row of the
        result is zero unless the entropy is wanted.
        """

    def gradients(self, z: Tensor, column: Tensor, temperature: float, by: Coefficients) -> None:
        """Overwrite logits z [n, V], before the temperature, with their gradient less `by.factor`."""


class TorchRows:
    def sums(self, z: Tensor, column: Tensor, temperature: float, with_entropy: bool) -> Tensor:
        out = torch.zeros(4, z.shape[0], dtype=wide(z), device=z.device)
        highest, total, target_z, weighted = out
        for rows in _blocks(z):
            x = z[rows].to(out.dtype)
            if temperature != 1.0:
                x.div_(temperature)
            target_z[rows] = x.gather(1, column[rows, None])[:, 0]
            highest[rows] = x.amax(1)
            x.sub_(highest[rows, None])
            exp = x.exp() if with_entropy else x.exp_()
            total[rows] = exp.sum(1)
            if with_entropy:
                weighted[rows] = torch.linalg.vecdot(exp, x)
        return out

    def gradients(self, z: Tensor, column: Tensor, temperature: float, by: Coefficients) -> None:
        for rows in _blocks(z):
            x = z[rows].to(wide(z))
            if temperature != 1.0:
                x.div_(temperature)
            x.sub_(by.highest[rows, None])
            if by.slope is None or by.offset is None:
                x.exp_()
            else:
                exp = x.exp()
                x.mul_(by.slope[rows, None]).add_(by.offset[rows, None]).mul_(exp)
            x.scatter_add_(1, column[rows, None], by.change[rows, None])
            if x.dtype != z.dtype:
                z[rows] = x


def row_kernel(name: str) -> RowKernel:
    """The kernel of a name in KERNELS."""
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} is not one of {', '.join(KERNELS)}")
    if name == "torch":
        return TorchRows()
    from megasapo.mcore.head_triton import TritonRows

    return TritonRows()


def choose_kernel(setting: str, device: torch.device) -> str:
    """The kernel for `model.head`: auto is triton on CUDA, torch elsewhere.

    ConfigError when it would be triton and that cannot run: torch in its place is the user's choice.
    """
    installed = importlib.util.find_spec("triton") is not None
    if setting == "auto":
        setting = "triton" if device.type == "cuda" else "torch"
    if setting not in KERNELS:
        raise ConfigError(f"model.head={setting!r} is not one of auto, {', '.join(KERNELS)}")
    if setting == "triton" and device.type != "cuda":
        raise ConfigError(f"model.head=triton needs CUDA, and the model is on {device.type!r}: use model.head=torch")
    if setting == "triton" and not installed:
        raise ConfigError("the head's kernel is triton, which is not installed: install it, or set model.head=torch")
    return setting


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(z: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_LOGITS["cpu" if z.device.type == "cpu" else "cuda"] // max(z.shape[1], 1))
    for start in range(0, z.shape[0], size):
        yield slice(start, start + size)
