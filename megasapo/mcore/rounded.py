"""Matrix products whose operands are rounded to FP8 as a recipe does, for linear layers and experts without TE.

emulation.py puts them into a model, experts.py calls `rounded_swiglu`. It knows nothing of process groups or layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasapo.fp8.history import AmaxHistory
from megasapo.fp8.recipes import ROLES, Recipe, Role
from megasapo.mcore.glu import GLU, SWIGLU, Biases, glu
from megasapo.mcore.main_grad import WeightGradient


@dataclass(slots=True)
class Emulation:
    """How the products of one model chunk are rounded, and whether they are."""

    recipe: Recipe
    history: AmaxHistory | None = None  # of fp8_delayed
    on: bool = True


@dataclass(frozen=True, slots=True)
class Rounding:
    """The rounding of one module's tensors: those of each of its weights have columns of their own in the history."""

    emulation: Emulation
    first_column: int

    def __call__(self, x: Tensor, role: Role, along: int, weight: int, *, seen: bool = False) -> Tensor:
        """[M, N] -> fp32, for a product with the module's `weight`-th weight that sums over dimension `along`.

        `seen`: count it in the history.
        """
        history, recipe = self.emulation.history, self.emulation.recipe
        if history is None or x.numel() == 0:
            return recipe.rounded(x, role, along)
        column = self.first_column + len(ROLES) * weight + ROLES.index(role)
        if seen:
            history.see(column, x)
        return recipe.rounded(x, role, along, history.scale[column])


def rounded_linear(x: Tensor, counts: Sequence[int], weights: Sequence[Tensor], rounding: Rounding) -> Tensor:
    """x [N, H] sorted by weight, counts summing to N, weights [F, H] each, to [N, F]: q(x) @ q(weight).T, in x's dtype.

    Products are summed in fp32. Backward rounds the output's gradient and multiplies with the rounded weights and
    inputs: q(dy) @ q(w), q(dy).T @ q(x), each rounded along what is summed over. The gradient of a weight wrapped in
    megatron-core's DDP goes to its `main_grad`. Tensors are counted in the history while gradients are enabled.
    """
    seen = torch.is_grad_enabled()  # inside the function it is always off
    return _RoundedLinear.apply(x, counts, rounding, seen, *weights)


def rounded_swiglu(
    tokens: Tensor,
    gates: Tensor,
    counts: Sequence[int],
    fc1: Sequence[Tensor],
    fc2: Sequence[Tensor],
    roundings: tuple[Rounding, Rounding],
    biases: Biases | None = None,
    unit: GLU = SWIGLU,
) -> Tensor:
    """experts.grouped_swiglu with rounded products; biases and the activation in between are computed as there."""
    h = rounded_linear(tokens, counts, fc1, roundings[0])
    if biases is not None:
        h = h + _per_token(biases.fc1, counts)
    hidden = (glu(h, unit) * gates[:, None]).to(tokens.dtype)
    out = rounded_linear(hidden, counts, fc2, roundings[1])
    return out if biases is None else (out + _per_token(biases.fc2, counts) * gates[:, None]).to(out.dtype)


def _per_token(biases: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    return torch.stack(list(biases)).repeat_interleave(torch.tensor(counts, device=biases[0].device), dim=0)


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], rounding: Rounding, seen: bool, *weights: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for i, rows in _parts(counts):
            weight = rounding(weights[i], "weight", 1, i, seen=seen)
            out[rows] = rounding(x[rows], "input", 1, i, seen=seen) @ weight.t()
        ctx.save_for_backward(x, *weights)
        ctx.counts, ctx.rounding = counts, rounding
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums = [
            WeightGradient(w) if wanted else None for w, wanted in zip(weights, ctx.needs_input_grad[4:], strict=True)
        ]
        for i, rows in _parts(ctx.counts):
            own = dy[rows]
            gradient = rounding(own, "gradient", 1, i, seen=True)
            if dx is not None:
                dx[rows] = gradient @ rounding(weights[i], "weight", 0, i)
            total = sums[i]
            if total is not None:
                if not rounding.emulation.recipe.by_tensor:
                    gradient = rounding(own, "gradient", 0, i)
                total.add(gradient, rounding(x[rows], "input", 0, i))
        return dx, None, None, None, *(s.result() if s is not None else None for s in sums)


def _parts(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each weight that has rows, and which."""
    start = 0
    for i, count in enumerate(counts):
        if count:
            yield i, slice(start, start + count)
        start += count
