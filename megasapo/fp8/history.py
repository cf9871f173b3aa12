"""The memory of the recipe fp8_delayed: scales that come from the largest values of earlier passes.

The learner's emulation keeps one for each model chunk, with a column for each tensor that is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megasapo.fp8.formats import Format


class AmaxHistory:
    """Scales of n tensors: first 1, then the format's largest value over the largest of up to `length` passes.

    A largest value of zero, or one that is not finite, leaves a scale as it was, as in Transformer Engine.
    """

    def __init__(
        self, formats: Sequence[Format], length: int, algo: Literal["max", "most_recent"], device: torch.device
    ) -> None:
        self._largest = torch.tensor([to.largest for to in formats], device=device)
        self._length, self._algo = length, algo
        self.scale = torch.ones_like(self._largest)
        self._now = torch.zeros_like(self._largest)
        self._passes = self._largest.new_zeros(0, len(formats))  # the last one first

    def see(self, column: int, x: Tensor) -> None:
        """Count x, of any shape but empty, as the tensor of a column in this pass; seeing it twice changes nothing."""
        amax = x.abs().amax().float()
        self._now[column] = torch.maximum(self._now[column], amax.nan_to_num(nan=torch.inf, posinf=torch.inf))

    def roll(self, reduce: Callable[[Tensor], None]) -> None:
        """End a pass: new scales from what was seen. `reduce` makes a tensor the maximum over ranks, in place."""
        reduce(self._now)
        self._passes = torch.cat([self._now[None], self._passes])[: self._length]
        amax = self._passes.amax(dim=0) if self._algo == "max" else self._now
        scale = (self._largest / amax).clamp(max=torch.finfo(torch.float32).max)
        self.scale = torch.where((amax > 0) & amax.isfinite(), scale, self.scale)
        self._now = torch.zeros_like(self._now)

    def state(self) -> dict[str, Any]:
        """What `restore` continues from, on the CPU; between passes."""
        return {"scale": self.scale.cpu(), "passes": self._passes.cpu()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another number of tensors."""
        if state["scale"].shape != self.scale.shape:
            raise ValueError(
                f"histories of {len(state['scale'])} tensors do not fit a model that rounds {len(self.scale)}"
            )
        self.scale = state["scale"].to(self.scale.device)
        self._passes = state["passes"][: self._length].to(self.scale.device)
        self._now = torch.zeros_like(self.scale)
