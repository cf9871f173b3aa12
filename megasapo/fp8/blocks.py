"""FP8 matrices with a scale for each block, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from megasapo.fp8.formats import E4M3, Format, cast, power_of_two_above, rounded

WEIGHT_BLOCK = (128, 128)
SCALE = "_scale_inv"  # files have a matrix's scales under its name and this
ROW_BLOCK = (1, 128)  # of activations and their gradients

Block = tuple[int, int]


def quantise_blocks(
    x: Tensor, block: Block = WEIGHT_BLOCK, to: Format = E4M3, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """[M, N] -> FP8 values [M, N] and what to multiply each block of them by: [ceil(M / b0), ceil(N / b1)] fp32.

    The largest value of a block becomes the format's largest; a block of zeros gets the scale 1. power_of_two rounds
    scales up to the next power of two, so that no value overflows. Blocks at the right and the bottom may be cut.
    An infinite value gets an infinite scale, which makes its whole block NaN again; a NaN gives its block the scale 1.
    """
    tiles, scale_inv = _scaled(x, block, to, power_of_two)
    return cast(_matrix(tiles, x.shape), to), scale_inv


def dequantise_blocks(
    values: Tensor, scale_inv: Tensor, block: Block = WEIGHT_BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The matrix that `quantise_blocks` stored. Raises ValueError when there is not one scale a block."""
    wanted = tuple(-(-n // b) for n, b in zip(values.shape, block, strict=True))
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(
            f"values {tuple(values.shape)} in blocks of {block[0]} x {block[1]} need scales {wanted}, "
            f"got {tuple(scale_inv.shape)}"
        )
    tiles = _tiles(values.float(), block) * scale_inv[:, None, :, None]
    return _matrix(tiles, values.shape).to(dtype)


def rounded_blocks(x: Tensor, block: Block, to: Format = E4M3) -> Tensor:
    """[M, N] -> fp32: what is left of x when it is stored in FP8 blocks whose scales are powers of two."""
    tiles, scale_inv = _scaled(x, block, to, power_of_two=True)
    return _matrix(rounded(tiles, to) * scale_inv[:, None, :, None], x.shape)


def _scaled(x: Tensor, block: Block, to: Format, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x as tiles divided by their scales, and the scales."""
    if x.dim() != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(x.shape)}")
    tiles = _tiles(x.float(), block)
    amax = tiles.abs().amax(dim=(1, 3))
    # never below the smallest normal number: a scale that vanishes would make NaN of zeros
    scale_inv = torch.where(amax > 0, (amax / to.largest).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    if power_of_two:
        scale_inv = power_of_two_above(scale_inv)
    return tiles / scale_inv[:, None, :, None], scale_inv


def _tiles(x: Tensor, block: Block) -> Tensor:
    """[M, N] -> [ceil(M / b0), b0, ceil(N / b1), b1], filled up with zeros."""
    rows, columns = (-(-n // b) for n, b in zip(x.shape, block, strict=True))
    padding = (0, columns * block[1] - x.shape[1], 0, rows * block[0] - x.shape[0])
    padded = torch.nn.functional.pad(x, padding) if any(padding) else x
    return padded.reshape(rows, block[0], columns, block[1])


def _matrix(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The matrix that `_tiles` cut and filled up."""
    rows, height, columns, width = tiles.shape
    return tiles.reshape(rows * height, columns * width)[: shape[0], : shape[1]]
