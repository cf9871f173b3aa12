"""What each recipe's matrix products see of their operands, as fp32 numbers, after Transformer Engine 2.11.

The learner's emulation rounds with `Recipe.rounded`. It knows nothing of layers; docs/fp8.md tells where emulation and
Transformer Engine differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megasapo.fp8.blocks import Block, rounded_blocks
from megasapo.fp8.formats import E4M3, E5M2, Format, rounded
from megasapo.sections import PrecisionConfig

Role = Literal["input", "weight", "gradient"]  # gradient: of a product's output
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the operands of linear layers are scaled and rounded."""

    name: Literal["fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"]
    gradients: Format = E4M3  # inputs and weights are always e4m3

    @staticmethod
    def of(cfg: PrecisionConfig) -> Recipe:
        assert cfg.recipe != "bf16", "bf16 rounds nothing"
        return Recipe(cfg.recipe, E5M2 if cfg.chosen_format == "hybrid" else E4M3)

    @property
    def by_tensor(self) -> bool:
        """Whether a tensor has one scale, so that it is the same along both dimensions."""
        return self.name in ("fp8_delayed", "fp8_tensorwise")

    def format(self, role: Role) -> Format:
        return self.gradients if role == "gradient" else E4M3

    def rounded(self, x: Tensor, role: Role, along: int, scale: Tensor | None = None) -> Tensor:
        """[M, N] -> fp32, for a product that sums over dimension `along`. An empty x stays as it is.

        fp8_delayed takes the scale of its history; the others find their own. A NaN never becomes a number. Infinities
        saturate under fp8_delayed, as in Transformer Engine, and make their tensor or block NaN under the others.
        """
        if x.numel() == 0:
            return x.float()
        to = self.format(role)
        match self.name:
            case "fp8_delayed":
                assert scale is not None, "fp8_delayed needs a scale"
                return rounded(x.float() * scale, to) / scale
            case "fp8_tensorwise":
                own = tensor_scale(x, to)
                return rounded(x.float() * own, to) / own
            case "fp8_blockwise" if role == "weight":
                return rounded_blocks(x, (128, 128), to)
            case "fp8_blockwise":
                return rounded_blocks(x, _strip(128, along), to)
            case "mxfp8":
                return rounded_blocks(x, _strip(32, along), to)


def _strip(length: int, along: int) -> Block:
    return (length, 1) if along == 0 else (1, length)


def tensor_scale(x: Tensor, to: Format) -> Tensor:
    """0-dim fp32: what makes the largest value of x the format's largest; 1 for zeros and NaN, 0 for infinities."""
    amax = x.abs().amax().float()
    return torch.where(amax > 0, (to.largest / amax).clamp(max=torch.finfo(torch.float32).max), 1.0)
