"""Log-ratios that stay finite, and functions whose derivative is written down instead of derived.

Used by the objectives and estimators of this package. Pure torch: no config, no process group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megasapo.algo.scales import MAX_LOG_RATIO

# Stands for an infinite log-probability: 1e8 of them still sum to a finite fp32 number.
LARGEST = 1e30


class _GivenSlope(torch.autograd.Function):
    """`value` forward, `slope` backward. Autograd's own chain would form (1 - p) with p rounded to 1, and 0 * inf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.mark_dirty(value)  # returned as it is: a copy would be one more pass over memory
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def with_slope(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """A function of x, elementwise, given by its value and its derivative at x (both without gradient, x's shape).

    `value` is given away: what is returned is that tensor.
    """
    return _GivenSlope.apply(x, value.detach(), slope.detach())  # type: ignore[no-untyped-call]


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is when wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def same_width(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, at least fp32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def log_ratio(logp: Tensor, base_logp: Tensor) -> Tensor:
    """logp - base_logp in at least fp32; 0 (without gradient) where both are the same infinity. NaN stays NaN."""
    logp, base_logp = at_least_fp32(logp), at_least_fp32(base_logp)
    both_infinite = torch.isinf(logp) & (logp == base_logp)
    return logp.masked_fill(both_infinite, 0.0) - base_logp.masked_fill(both_infinite, 0.0)


def finite_log_ratio(logp: Tensor, base_logp: Tensor) -> tuple[Tensor, Tensor]:
    """log_ratio of one dtype without gradient, infinities taken for its largest number; and 1 where logp is infinite.

    By arithmetic alone: comparing and masking take a CPU several times as long. NaN stays NaN in the log-ratio.
    """
    largest = torch.finfo(logp.dtype).max
    d = logp.clamp(-largest, largest).sub_(base_logp.clamp(-largest, largest))
    return d, (logp - logp).nan_to_num_(nan=1.0)  # inf - inf is NaN


def finite(x: Tensor) -> Tensor:
    """x with infinities replaced by +-1e30; the gradient is 0 there."""
    return x.clamp(-LARGEST, LARGEST)


def bounded_exp(log_value: Tensor) -> Tensor:
    """exp, constant above MAX_LOG_RATIO so that it never overflows fp32."""
    return log_value.clamp(max=MAX_LOG_RATIO).exp()
