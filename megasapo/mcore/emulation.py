"""Emulation of FP8 in a model of megatron-core's local spec: which products are rounded, and what is remembered.

model.py installs it, precision.py switches it off, step.py ends a pass of fp8_delayed, checkpoint.py keeps its memory.
How a matrix is rounded, megasapo.fp8 says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megasapo.fp8.history import AmaxHistory
from megasapo.fp8.recipes import ROLES, Recipe, Role
from megasapo.mcore.latent import WholeLinear
from megasapo.mcore.main_grad import WeightGradient
from megasapo.mcore.topology import Topology
from megasapo.sections import PrecisionConfig


@dataclass(slots=True)
class Emulation:
    """How the products of one model chunk are rounded, and whether they are."""

    recipe: Recipe
    history: AmaxHistory | None = None  # of fp8_delayed
    on: bool = True


@dataclass(frozen=True, slots=True)
class Rounding:
    """The rounding of one linear layer's tensors, which have columns of their own in the history."""

    emulation: Emulation
    first_column: int

    def __call__(self, x: Tensor, role: Role, along: int, *, seen: bool = False) -> Tensor:
        """[M, N] -> fp32, for a product that sums over dimension `along`. `seen`: count it in the history."""
        history, recipe = self.emulation.history, self.emulation.recipe
        if history is None or x.numel() == 0:
            return recipe.rounded(x, role, along)
        column = self.first_column + ROLES.index(role)
        if seen:
            history.see(column, x)
        return recipe.rounded(x, role, along, history.scale[column])


def install(chunk: Any, cfg: PrecisionConfig, quantises_layer: Callable[[int], bool], device: torch.device) -> None:
    """Round the products of a GPTModel's linear layers, experts' too, in the layers that `quantises_layer` names.

    Layers count from 0 over all stages. Attention's core, router, norms, embedding and output head stay as they are.
    """
    emulation = Emulation(Recipe.of(cfg))
    linears: list[Any] = [
        module
        for layer in chunk.decoder.layers
        if quantises_layer(layer.layer_number - 1)
        for module in layer.modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | WholeLinear)
    ]
    for i, linear in enumerate(linears):
        linear._forward_impl = partial(_forward, linear, Rounding(emulation, i * len(ROLES)))
    if cfg.recipe == "fp8_delayed":
        formats = [emulation.recipe.format(role) for role in ROLES] * len(linears)
        emulation.history = AmaxHistory(formats, cfg.amax_history, cfg.amax_algo, device)
    chunk.emulation = emulation


def _forward(
    module: Any, rounding: Rounding, *, input: Tensor, weight: Tensor, bias: Tensor | None, **how: Any
) -> Tensor:
    """In place of a linear layer's product, communication over tensor-parallel ranks included.

    The whole sequence is gathered first, so one scale holds for all of it, as where Transformer Engine takes the
    maximum over the tensor-parallel ranks; what is cut along the hidden dimension has a scale on each rank, as there.
    """
    if not rounding.emulation.on:
        return type(module)._forward_impl(module, input=input, weight=weight, bias=bias, **how)
    if how["sequence_parallel"]:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=how["tp_group"])
    elif how["allreduce_dgrad"]:
        input = copy_to_tensor_model_parallel_region(input, group=how["tp_group"])
    out = rounded_linear(input.flatten(0, -2), weight, rounding).unflatten(0, input.shape[:-1])
    return out if bias is None else out + bias


def rounded_linear(x: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
    """x [N, H], weight [F, H], to [N, F]: q(x) @ q(weight).T, in x's dtype.

    Products are summed in fp32. Backward rounds the output's gradient and multiplies with the rounded weight and
    inputs: q(dy) @ q(w), q(dy).T @ q(x), each rounded along what is summed over. The gradient of a weight wrapped in
    megatron-core's DDP goes to its `main_grad`. Tensors are counted in the history while gradients are enabled; the
    weight of an expert without tokens is not.
    """
    seen = torch.is_grad_enabled() and x.shape[0] > 0  # inside the function gradients are always off
    return _RoundedLinear.apply(x, weight, rounding, seen)


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: Rounding, seen: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rounding = rounding
        rounded_weight = rounding(weight, "weight", 1, seen=seen)
        return (rounding(x, "input", 1, seen=seen) @ rounded_weight.t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        gradient = rounding(dy, "gradient", 1, seen=True)
        dx = (gradient @ rounding(weight, "weight", 0)).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        if not rounding.emulation.recipe.by_tensor:
            gradient = rounding(dy, "gradient", 0)
        total = WeightGradient(weight)
        total.add(gradient, rounding(x, "input", 0))
        return dx, total.result(), None, None


def emulations(chunks: Sequence[nn.Module]) -> list[Emulation]:
    """Those of (possibly wrapped) model chunks, in order; none for a model that is not emulated."""
    found = [getattr(module, "emulation", None) for chunk in chunks for module in chunk.modules()]
    return [own for own in found if isinstance(own, Emulation)]


def end_pass(chunks: Sequence[nn.Module], topo: Topology) -> None:
    """Collective. New scales of fp8_delayed after a pass with gradients; one that rounds otherwise has none.

    Largest values are those over the tensor-, context- and data-parallel ranks of a stage, as in Transformer Engine,
    under which experts that are each the i-th of their rank share them, too.
    """

    def largest(values: Tensor) -> None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=topo.tokens_group)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=topo.dp_group)

    for emulation in emulations(chunks):
        if emulation.history is not None:
            emulation.history.roll(largest)


def histories(chunks: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """What a checkpoint keeps of each chunk's fp8_delayed; empty under other recipes."""
    return [e.history.state() for e in emulations(chunks) if e.history is not None]


def restore_histories(chunks: Sequence[nn.Module], states: Sequence[dict[str, Any]]) -> None:
    """Continue from `histories`, for a model that has made no pass. Without any, as after a run of another recipe,
    histories begin with its first.

    Raises ValueError when they are of another model or layout.
    """
    own = [e.history for e in emulations(chunks) if e.history is not None]
    if states and own and len(states) != len(own):
        raise ValueError(f"histories of {len(states)} model chunks do not fit {len(own)}")
    for history, state in zip(own, states, strict=False):
        history.restore(state)
