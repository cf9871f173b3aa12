"""The gated unit between an expert's two products, and its gradient: SwiGLU, and gpt-oss's clamped kind with an offset.

Called by experts.py and rounded.py. Pure arithmetic on tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GLU(NamedTuple):
    """a * sigmoid(alpha * a) * (b + offset), a at most `limit` and b between -limit and limit; alpha 1 is silu."""

    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0


SWIGLU = GLU()


class Biases(NamedTuple):
    """One tensor an expert: [2F] of its first product, [H] of its second."""

    fc1: Sequence[Tensor]
    fc2: Sequence[Tensor]


def glu(h: Tensor, unit: GLU) -> Tensor:
    """[N, 2F] = [a, b] to [N, F], in new memory."""
    scaled, linear = _clamped(h, unit)
    out = F.silu(scaled) * linear
    return out if unit.alpha == 1 else out / unit.alpha


def glu_backward(h: Tensor, d_hidden: Tensor, gates: Tensor, grad_gates: Tensor, unit: GLU) -> tuple[Tensor, Tensor]:
    """glu(h) * gates, and the gradient of h = [a, b], from that of the former, which is overwritten.

    Writes the gates' gradient, summed in their own (wide) dtype, into `grad_gates`.
    """
    scaled, linear = _clamped(h, unit)
    silu = F.silu(scaled)
    if unit.alpha != 1:
        silu.div_(unit.alpha)
    hidden = silu * linear
    torch.sum(d_hidden.to(gates.dtype) * hidden, dim=1, out=grad_gates)
    hidden.mul_(gates[:, None])
    d_hidden.mul_(gates[:, None])
    dh = torch.empty_like(h)
    da, db = dh.chunk(2, dim=1)
    torch.mul(d_hidden, silu, out=db)
    torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(linear), scaled, grad_input=da)
    if unit.limit is not None:
        a, b = h.chunk(2, dim=1)
        da.masked_fill_(a > unit.limit, 0)
        db.masked_fill_(b.abs() > unit.limit, 0)
    return hidden, dh


def _clamped(h: Tensor, unit: GLU) -> tuple[Tensor, Tensor]:
    """alpha * a and b + offset, both clamped before."""
    a, b = h.chunk(2, dim=1)
    if unit.limit is not None:
        a, b = a.clamp(max=unit.limit), b.clamp(-unit.limit, unit.limit)
    return (a if unit.alpha == 1 else a * unit.alpha), (b + unit.offset if unit.offset else b)
