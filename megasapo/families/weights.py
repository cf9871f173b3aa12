"""What a family's weight table is made of: rules that pair a megatron-core tensor with HF tensors, and layouts.

A layout says, for one rank's shard, which box of which HF tensor is which box of the local parameter. Loading copies
along these boxes one way and exporting the other way, so the two are inverse by construction. No torch in here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from megasapo.errors import UserError

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # start and stop in every dimension


HEAD_NAME, EMBEDDING_NAME = (
    "lm_head.weight",
    "model.embed_tokens.weight",
)  # with tied embeddings the first is the second


class BridgeError(UserError, ValueError):
    """Weights do not fit the model: a tensor is missing, left over, of the wrong shape, or its file is broken."""


class Shard(NamedTuple):
    """Which of `size` equal parts of a parameter this rank holds."""

    rank: int
    size: int


class Dims(NamedTuple):
    """The numbers of the model that layouts need; everything else follows from the parameters' shapes."""

    vocab_size: int  # without padding
    num_heads: int
    num_kv_heads: int
    num_experts: int = 0
    expert: int = 0  # which one the parameter belongs to


class Piece(NamedTuple):
    """A box of one HF tensor and the box of the local parameter that holds it.

    The boxes have the same shape, unless `turns` says otherwise: then HF stores the box transposed, all dimensions in
    reverse, after `turns` equal parts of its first dimension have been made to take turns (1: it is left as it is).
    """

    source: int  # which of the rule's HF tensors
    hf: Box
    local: Box
    turns: int = 0


class Mapped(NamedTuple):
    """A local parameter seen from HF: the full shapes of its HF tensors, and the pieces of them it holds."""

    shapes: tuple[Shape, ...]
    pieces: tuple[Piece, ...]


Layout = Callable[[Shape, Shard, Dims], Mapped]


@dataclass(frozen=True, slots=True)
class Rule:
    """One megatron-core tensor (its names under the local and the TE spec) and the HF tensors it is made of.

    `{layer}` and `{expert}` stand for indices: local ones in `mcore`, global ones in `hf`.
    """

    mcore: tuple[str, ...]
    hf: tuple[str, ...]
    layout: Layout
    keeps_dtype: bool = False  # written and published in the learner's own dtype, whatever that of the others is

    @property
    def is_expert(self) -> bool:
        return "{expert}" in self.mcore[0]

    @property
    def is_layer(self) -> bool:
        return "{layer}" in self.hf[0]


@dataclass(frozen=True, slots=True)
class WeightTable:
    """The weights of one HF model_type; rules stand in the order of the HF state dict."""

    rules: tuple[Rule, ...]
    mtp_layers: bool = False  # files may have layers for multi-token prediction after the last: see mtp.py


def whole(local: Shape, shard: Shard, dims: Dims) -> Mapped:
    """The same tensor on every rank."""
    box = full_box(local)
    return Mapped((local,), (Piece(0, box, box),))


def rows(local: Shape, shard: Shard, dims: Dims) -> Mapped:
    """Cut along the first dimension: column-parallel weights."""
    return _cut(local, shard, axis=0)


def columns(local: Shape, shard: Shard, dims: Dims) -> Mapped:
    """Cut along the second dimension: row-parallel weights."""
    return _cut(local, shard, axis=1)


def gate_up(local: Shape, shard: Shard, dims: Dims) -> Mapped:
    """Two HF tensors, gate and up, each cut along the first dimension; a shard is its gate rows, then its up rows."""
    half = local[0] // 2
    start, full = shard.rank * half, (half * shard.size, *local[1:])
    pieces = [_row_piece(source, start, source * half, half, local) for source in (0, 1)]
    return Mapped((full, full), tuple(pieces))


def vocab(local: Shape, shard: Shard, dims: Dims) -> Mapped:
    """Cut along the first dimension, padded at the end to equal shards; HF has no padding."""
    start = shard.rank * local[0]
    length = max(0, min(local[0], dims.vocab_size - start))
    pieces = (_row_piece(0, start, 0, length, local),) if length else ()
    return Mapped(((dims.vocab_size, *local[1:]),), pieces)


def qkv(local: Shape, shard: Shard, dims: Dims) -> Mapped:
    """Three HF tensors q, k, v; megatron-core stores for each kv group its query heads, its key head, its value head.

    The stored rows are then cut into equal shards wherever that falls, also inside a group when there are fewer groups
    than ranks. Works for weights and biases.
    """
    queries = dims.num_heads // dims.num_kv_heads
    head = local[0] * shard.size // (dims.num_kv_heads * (queries + 2))
    heads = (queries, 1, 1)
    first, last = shard.rank * local[0], (shard.rank + 1) * local[0]
    pieces, at = [], 0
    for group in range(dims.num_kv_heads):
        for source, count in enumerate(heads):
            length = count * head
            low, high = max(at, first), min(at + length, last)
            if low < high:
                pieces.append(_row_piece(source, group * length + low - at, low - first, high - low, local))
            at += length
    shapes = tuple((dims.num_kv_heads * count * head, *local[1:]) for count in heads)
    return Mapped(shapes, tuple(pieces))


def of_all_experts(layout: Layout, turns: int) -> Layout:
    """One HF tensor of all experts, the first dimension; each holds what `layout` says, stored as Piece says."""

    def of_one(local: Shape, shard: Shard, dims: Dims) -> Mapped:
        mapped = layout(local, shard, dims)
        shapes = tuple((dims.num_experts, *reversed(shape)) for shape in mapped.shapes)
        own = (dims.expert, dims.expert + 1)
        return Mapped(shapes, tuple(p._replace(hf=(own, *reversed(p.hf)), turns=turns) for p in mapped.pieces))

    return of_one


def _cut(local: Shape, shard: Shard, axis: int) -> Mapped:
    full = tuple(n * shard.size if i == axis else n for i, n in enumerate(local))
    start = shard.rank * local[axis]
    hf = tuple((start, start + n) if i == axis else (0, n) for i, n in enumerate(local))
    return Mapped((full,), (Piece(0, hf, full_box(local)),))


def _row_piece(source: int, hf_start: int, local_start: int, length: int, local: Shape) -> Piece:
    rest = full_box(local[1:])
    return Piece(source, ((hf_start, hf_start + length), *rest), ((local_start, local_start + length), *rest))


def full_box(shape: Shape) -> Box:
    return tuple((0, n) for n in shape)


@cache
def pattern(template: str) -> re.Pattern[str]:
    """A regular expression for the names a template stands for, with groups `layer` and `expert`."""
    escaped = re.escape(template)
    for index in ("layer", "expert"):
        escaped = escaped.replace(rf"\{{{index}\}}", rf"(?P<{index}>\d+)")
    return re.compile(escaped)


def index_of(match: re.Match[str], name: str) -> int | None:
    """The number that a template's `{layer}` or `{expert}` stood for; None when the template has none."""
    found = match.groupdict().get(name)
    return None if found is None else int(found)
