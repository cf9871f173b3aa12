"""Emulation of FP8 in a model of megatron-core's local spec: which products are rounded, and what is remembered.

model.py installs it, precision.py switches it off, step.py ends a pass of fp8_delayed, checkpoint.py keeps its memory.
The arithmetic is in rounded.py and megasapo.fp8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from megasapo.fp8.history import AmaxHistory
from megasapo.fp8.recipes import ROLES, Recipe
from megasapo.mcore.experts import GroupedExperts
from megasapo.mcore.rounded import Emulation, Rounding, rounded_linear
from megasapo.mcore.topology import Topology
from megasapo.sections import PrecisionConfig


def install(chunk: Any, cfg: PrecisionConfig, quantises_layer: Callable[[int], bool], device: torch.device) -> None:
    """Round the products of a GPTModel's linear layers and experts, in the layers that `quantises_layer` names.

    Layers count from 0 over all stages. Attention's core, router, norms, embedding and output head stay as they are.
    """
    emulation = Emulation(Recipe.of(cfg))
    columns = 0

    def rounding(weights: int) -> Rounding:
        nonlocal columns
        own = Rounding(emulation, columns)
        columns += weights * len(ROLES)
        return own

    for layer in chunk.decoder.layers:
        if not quantises_layer(layer.layer_number - 1):
            continue
        for module in layer.modules():
            if isinstance(module, GroupedExperts):
                module.roundings = rounding(module.num_local_experts), rounding(module.num_local_experts)
            elif isinstance(module, ColumnParallelLinear | RowParallelLinear) and not module.is_expert:
                module._forward_impl = partial(_forward, module, rounding(1))
    if cfg.recipe == "fp8_delayed":
        formats = [emulation.recipe.format(role) for role in ROLES] * (columns // len(ROLES))
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
    rows = input.reshape(-1, input.shape[-1])
    out = rounded_linear(rows, [rows.shape[0]], [weight], rounding).view(*input.shape[:-1], -1)
    return out if bias is None else out + bias


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
