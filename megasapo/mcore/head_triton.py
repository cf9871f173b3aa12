"""The output head's work on rows of logits as Triton kernels: one pass over a row in forward, one in backward.

head_rows.py gives it to head.py when the kernel is "triton", and holds the torch code that it must agree with. Logits
are read and gradients written in the matrix products' dtype; all that happens in between is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megasapo.mcore.head_rows import Coefficients

BLOCK, WARPS = 4096, 8  # logits that a program works on at a time: 16 a thread


class TritonRows:
    def sums(self, z: Tensor, column: Tensor, temperature: float, with_entropy: bool) -> Tensor:
        _check(z)
        rows, columns = z.shape
        out = torch.zeros(4, rows, dtype=torch.float32, device=z.device)
        if rows:
            _sums[(rows,)](
                z,
                z.stride(0),
                column.contiguous(),
                out,
                rows,
                columns,
                float(temperature),
                with_entropy,
                **_shape(columns),
            )
        return out

    def gradients(self, z: Tensor, column: Tensor, temperature: float, by: Coefficients) -> None:
        _check(z)
        rows, columns = z.shape
        with_entropy = by.slope is not None and by.offset is not None
        slope, offset = by.slope, by.offset
        if slope is None or offset is None:
            slope = offset = by.change  # not read then
        per_row = (column, by.highest, by.change, slope, offset)
        if rows:
            shape = _shape(columns)
            grid = (rows, triton.cdiv(columns, shape["BLOCK"]))
            _gradients[grid](
                z, z.stride(0), *(t.contiguous() for t in per_row), columns, float(temperature), with_entropy, **shape
            )


def _check(z: Tensor) -> None:
    if z.dtype == torch.float64:
        raise ValueError("the triton kernel computes in fp32, and the logits are fp64: use kernel='torch'")
    assert z.stride(1) == 1, f"logits with strides {z.stride()}: the kernel reads rows"


def _shape(columns: int) -> dict[str, int]:
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(columns)), "num_warps": WARPS}


@triton.jit
def _sums(
    z: tl.tensor,
    stride: tl.tensor,
    column: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    temperature: tl.tensor,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row a program; the sums follow the highest logit so far, and shrink when it rises."""
    row = tl.program_id(0).to(tl.int64)
    of_row = z + row * stride
    highest = float("-inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(of_row + at, mask=at < columns, other=float("-inf")).to(tl.float32) / temperature
        higher = tl.maximum(highest, tl.max(x, 0))
        shift = tl.maximum(highest - higher, -1000.0)  # -inf at first; its exponential is zero either way
        scale = tl.exp(shift)
        x = x - higher
        e = tl.exp(x)
        if ENTROPY:
            weighted = (weighted + total * shift) * scale + tl.sum(tl.where(at < columns, x, 0.0) * e, 0)
        total = total * scale + tl.sum(e, 0)
        highest = higher
    target_z = tl.load(of_row + tl.load(column + row)).to(tl.float32) / temperature
    tl.store(out + row, highest)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, target_z)
    tl.store(out + 3 * rows + row, weighted)


@triton.jit
def _gradients(
    z: tl.tensor,
    stride: tl.tensor,
    column: tl.tensor,
    highest: tl.tensor,
    change: tl.tensor,
    slope: tl.tensor,
    offset: tl.tensor,
    columns: tl.tensor,
    temperature: tl.tensor,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one row a program, in place."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = z + row * stride + at
    x = tl.load(here, mask=at < columns, other=0.0).to(tl.float32) / temperature - tl.load(highest + row)
    e = tl.exp(x)
    if ENTROPY:
        e = e * (tl.load(slope + row) * x + tl.load(offset + row))
    e = e + tl.where(at == tl.load(column + row), tl.load(change + row), 0.0)
    tl.store(here, e.to(z.dtype.element_ty), mask=at < columns)
