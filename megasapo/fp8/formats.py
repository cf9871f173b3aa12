"""The two FP8 formats of "FP8 Formats for Deep Learning" (arXiv 2209.05433), and a cast that saturates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Format:
    dtype: torch.dtype
    largest: float


E4M3 = Format(torch.float8_e4m3fn, 448.0)
E5M2 = Format(torch.float8_e5m2, 57344.0)


def cast(x: Tensor, to: Format) -> Tensor:
    """`x` rounded to the nearest value of the format, ties to even; what is too large becomes the largest. NaN stays.

    Clamped first, for torch 2.11 and older give NaN (e4m3) or infinity (e5m2) instead of saturating.
    """
    return x.clamp(-to.largest, to.largest).to(to.dtype)
