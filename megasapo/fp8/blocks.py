"""FP8 matrices with a scale for each block, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from megasapo.fp8.formats import E4M3, Format, cast

WEIGHT_BLOCK = (128, 128)
ROW_BLOCK = (1, 128)  # of activations and their gradients


def quantise_blocks(
    x: Tensor, block: tuple[int, int] = WEIGHT_BLOCK, to: Format = E4M3, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """[M, N] -> FP8 values [M, N] and what to multiply each block of them by: [ceil(M / b0), ceil(N / b1)] fp32.

    The largest value of a block becomes the format's largest; a block of zeros gets the scale 1. power_of_two rounds
    scales up to the next power of two, so that no value overflows. Blocks at the right and the bottom may be cut.
    """
    if x.dim() != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(x.shape)}")
    amax = _pad(x.abs().float(), block).amax(dim=(1, 3))
    scale_inv = torch.where(amax > 0, amax / to.largest, 1.0)
    if power_of_two:
        scale_inv = torch.exp2(torch.ceil(torch.log2(scale_inv)))
    return cast(x.float() / _spread(scale_inv, block, x.shape), to), scale_inv


def dequantise_blocks(
    values: Tensor, scale_inv: Tensor, block: tuple[int, int] = WEIGHT_BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The matrix that `quantise_blocks` stored. Raises ValueError when there is not one scale a block."""
    wanted = tuple(-(-n // b) for n, b in zip(values.shape, block, strict=True))
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(
            f"values {tuple(values.shape)} in blocks of {block[0]} x {block[1]} need scales {wanted}, "
            f"got {tuple(scale_inv.shape)}"
        )
    return (values.float() * _spread(scale_inv, block, values.shape)).to(dtype)


def _pad(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[M, N] -> [M / b0, b0, N / b1, b1], filled up with zeros."""
    rows, columns = (-(-n // b) for n, b in zip(x.shape, block, strict=True))
    padded = torch.nn.functional.pad(x, (0, columns * block[1] - x.shape[1], 0, rows * block[0] - x.shape[0]))
    return padded.view(rows, block[0], columns, block[1])


def _spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Each block's scale for each of its values."""
    wide = scales.repeat_interleave(block[0], dim=0)[: shape[0]]
    return wide.repeat_interleave(block[1], dim=1)[:, : shape[1]]
