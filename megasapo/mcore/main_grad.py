"""The gradient of one weight, summed over several products, and where megatron-core's DDP wants it.

Called in the backward passes of our own autograd functions. It knows nothing of what is multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class WeightGradient:
    """Sums products in fp32 or wider: in `weight.main_grad` where megatron-core's DDP has set that, or apart.

    DDP resets `grad_added_to_main_grad` before a step; while it is true, DDP's hook leaves our part alone. Gradients
    of the same weight that come through autograd are then still added if megatron-core set `zero_out_wgrad` on it.
    Not for `overlap_grad_reduce`, which wants a gradient from autograd as well.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        main_grad: Any = getattr(weight, "main_grad", None) if hasattr(weight, "grad_added_to_main_grad") else None
        self._in_place = main_grad is not None and main_grad.dtype == wide
        self._sum: Tensor = main_grad if self._in_place else torch.zeros_like(weight, dtype=wide)

    def add(self, grad_output: Tensor, inputs: Tensor) -> None:
        """Add grad_output.T @ inputs, [n, rows] and [n, columns], to the first rows of the gradient."""
        into = self._sum[: grad_output.shape[1]]
        if into.dtype == inputs.dtype:
            into.addmm_(grad_output.t(), inputs)
        elif into.is_cuda:  # one product that adds in fp32; the CPU has none of mixed dtypes
            torch.addmm(into, grad_output.t(), inputs, out_dtype=into.dtype, out=into)
        else:
            into += grad_output.t() @ inputs

    def result(self) -> Tensor | None:
        """What autograd is to be given: nothing when the gradient is in `main_grad` already."""
        if not self._in_place:
            return self._sum.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return None
