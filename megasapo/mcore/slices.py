"""A rank's own part of masters and moments, as pieces of a checkpoint's tensors: nothing is gathered to save it.

Called by optim.py. megatron-core's distributed optimizer gives each data-parallel rank a flat slice of a parameter's
master and moments. A flat slice of a tensor is a few boxes, and torch's checkpoints store boxes and find them by where
they are: names and what loads them stay those of megatron-core's `fully_reshardable` format, which would gather whole
parameters on every rank (0.16.1 to 0.19.2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

STATES = ("param", "exp_avg", "exp_avg_sq")  # as megatron-core calls them in checkpoints; always float32 there


class Box(NamedTuple):
    """A rectangular part of a tensor, and where in memory its first element lies."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int


def own_pieces(part: Any, model_state: dict[str, Any]) -> list[ShardedTensor]:
    """Of one of megatron-core's distributed optimizers, what this rank is to save; data are views of the live state.

    `model_state`: the sharded state of the model, whose tensors are the parameters themselves.
    """
    known = {base.data: base for base in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    pieces = []
    for parameter, begin, end, state in own_slices(part):
        for whole in whole_tensors(known[parameter]):
            if any(whole.replica_id[:-1]):  # another rank's to save; the last one counts data-parallel ranks
                continue
            first, stride = whole.data.storage_offset(), whole.data.stride()
            for box in boxes(whole.data.shape, stride, first, begin, end):
                for name in STATES:
                    flat = state[name].detach()
                    view = flat.as_strided(box.shape, stride, flat.storage_offset() + box.offset - begin)
                    pieces.append(_piece(whole, name, box, view.float()))
    return pieces


def boxes(shape: Sequence[int], stride: Sequence[int], first: int, begin: int, end: int) -> Iterator[Box]:
    """What memory from `begin` until before `end` holds of a tensor whose first element lies at `first`.

    `stride`: in elements, that of rows no smaller than what a row spans, as of any part of a contiguous tensor. At most
    2n - 1 boxes for n dimensions, in the order of memory.
    """
    if not shape:
        if begin <= first < end:
            yield Box((), (), first)
        return
    size, step, rest, inner = shape[0], stride[0], shape[1:], stride[1:]
    span = 1 + sum((n - 1) * s for n, s in zip(rest, inner, strict=True))  # of memory, by one row
    low = max(-((first - begin) // step), 0)  # the first row that begins inside
    high = min((end - first - span) // step + 1, size)  # after the last row that ends inside

    def cut(row: int) -> Iterator[Box]:
        for box in boxes(rest, inner, first + row * step, begin, end):
            yield Box((row, *box.start), (1, *box.shape), box.offset)

    if 0 < low <= size:
        yield from cut(low - 1)
    if low < high:
        yield Box((low, *(0 for _ in rest)), (high - low, *rest), first + low * step)
    if low <= high < size:
        yield from cut(high)


def make_up(size: Sequence[int], parts: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether every element of a tensor of this size is in exactly one of the parts."""
    volume = sum(math.prod(part.sizes) for part in parts)
    inside = all(o + n <= whole for part in parts for o, n, whole in zip(part.offsets, part.sizes, size, strict=True))
    return inside and volume == math.prod(size) and not _overlap(parts)


def _overlap(parts: Sequence[ChunkStorageMetadata], axis: int = 0, tried: int = 0) -> bool:
    """Whether any two share an element: divides them along one axis after another into groups that lie apart."""
    axes = len(parts[0].sizes)
    if len(parts) == 1 or tried == axes:  # what no axis divides may lie around one another
        return any(_meet(a, b) for a, b in itertools.combinations(parts, 2))
    groups: list[list[ChunkStorageMetadata]] = []
    end = -1
    for part in sorted(parts, key=lambda part: part.offsets[axis]):
        if part.offsets[axis] >= end:
            groups.append([])
        groups[-1].append(part)
        end = max(end, part.offsets[axis] + part.sizes[axis])
    tried = tried + 1 if len(groups) == 1 else 0
    return any(_overlap(group, (axis + 1) % axes, tried) for group in groups)


def _meet(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    return all(o < p + n and p < o + m for o, m, p, n in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))


def own_slices(part: Any) -> Iterator[tuple[torch.Tensor, int, int, dict[str, torch.Tensor]]]:
    """Parameter, the range of its elements that is this rank's, and their master and moments, flat."""
    states = part.get_parameter_state_dp_reshardable()
    for i, ranges in enumerate(part.gbuf_ranges):
        for dtype, buckets in ranges.items():
            for bucket, found in zip(buckets, states[i][dtype], strict=True):
                for (parameter, where), state in zip(bucket["param_map"].items(), found, strict=True):
                    yield parameter, where["param"].start, where["param"].end, state


def whole_tensors(base: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The tensors of a checkpoint that a parameter is made of, each a view into memory that is laid out like it.

    A gated unit's fc1 is two: one for the gates, one for what they multiply.
    """
    memory = torch.empty(base.data.shape, dtype=torch.uint8)  # never touched, so it costs nothing
    if isinstance(base, ShardedTensor):
        return [replace(base, data=memory, dtype=memory.dtype)]
    wholes = list(nested_values(replace(base, data=memory).build()))
    for whole in wholes:
        if whole.data.untyped_storage().data_ptr() != memory.untyped_storage().data_ptr():
            raise NotImplementedError(f"{base.key} is saved as copies of its parameter, not as parts of it")
    return wholes


def _piece(whole: ShardedTensor, name: str, box: Box, data: torch.Tensor) -> ShardedTensor:
    before = whole.prepend_axis_num  # axes that the tensor has in the checkpoint alone: layer, expert
    data = data.view(*(1 for _ in range(before)), *box.shape)
    start = (*(0 for _ in range(before)), *box.start)
    return replace(
        whole,
        key=f"optimizer.state.{name}.{whole.key}",
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_offset=tuple(a + b for a, b in zip(whole.global_offset, start, strict=True)),
        axis_fragmentations=None,  # no regular grid
        replica_id=0,
        prepend_axis_num=0,
    )
