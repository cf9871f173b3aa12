"""The two FP8 formats of "FP8 Formats for Deep Learning" (arXiv 2209.05433), and a cast that saturates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Format:
    dtype: torch.dtype
    largest: float
    smallest: float  # normal number; those below lie as far apart as the ones just above
    mantissa: int  # bits


E4M3 = Format(torch.float8_e4m3fn, 448.0, 2.0**-6, 3)
E5M2 = Format(torch.float8_e5m2, 57344.0, 2.0**-14, 2)

EXPONENT = 0x7F800000  # the bits of it in an fp32 number


def cast(x: Tensor, to: Format) -> Tensor:
    """`x` rounded to the nearest value of the format, ties to even; what is too large becomes the largest. NaN stays.

    Clamped first, for torch 2.11 and older give NaN (e4m3) or infinity (e5m2) instead of saturating.
    """
    return x.clamp(-to.largest, to.largest).to(to.dtype)


def rounded(x: Tensor, to: Format) -> Tensor:
    """What `cast` makes of x, as fp32.

    By arithmetic, ten times as fast on a CPU as casting there and back: adding 1.5 * 2^23 steps of the format leaves an
    fp32 number no bits for less than a step, so the processor rounds.
    """
    x = x.float().clamp(-to.largest, to.largest)
    power = (x.view(torch.int32) & EXPONENT).view(torch.float32)  # of two, at or below |x|; infinite for NaN
    shift = power.clamp_(min=to.smallest).mul_(1.5 * 2.0 ** (23 - to.mantissa))
    return (x + shift).sub_(shift)


def power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two that is no smaller than x, which is fp32 and a positive normal number or infinite."""
    power = (x.view(torch.int32) & EXPONENT).view(torch.float32)
    return torch.where(power < x, 2 * power, power)
