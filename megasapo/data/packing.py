"""Packing sequences into one row of tokens, cutting the row over ranks, and taking per-token values apart by sequence.

Called when a batch is made and where a loss needs a whole sequence. The layout is `types.MicroBatch`'s. Which part of
the row a rank holds is given as numbers; no process group here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megasapo.layout import slot_multiple, slots_for
from megasapo.types import MicroBatch, TrainSequence

PAD_TOKEN = 0  # any valid id: padding is masked

# of each sequence, by uid: positions [m] and values [m, ...] of the tokens that one rank holds
Pieces = dict[int, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a pack: context parallelism cuts every sequence, tensor parallelism then the tokens in a row.

    Of 2 * cp equal chunks of a sequence, rank r of cp holds numbers r and 2 * cp - 1 - r: together they attend to as
    many earlier tokens as any other rank's.
    """

    cp: int = 1
    cp_rank: int = 0
    tp: int = 1
    tp_rank: int = 0
    rows: int = 1  # each rank's tokens come in multiples of this (PrecisionConfig.rows)

    @property
    def pack_multiple(self) -> int:
        """Slots of a pack come in multiples of this."""
        return math.lcm(slot_multiple(self.cp), self.cp * self.tp * self.rows)

    def slots_for(self, tokens: int) -> int:
        """The slots that a sequence of so many tokens takes."""
        return slots_for(tokens, self.cp)

    def context_slots(self, bounds: np.ndarray) -> np.ndarray:
        """[Tc] the slots of a pack, with sequence boundaries [S + 1], that this context-parallel rank holds."""
        if self.cp == 1:
            return np.arange(bounds[-1])
        held = []
        for start, end in itertools.pairwise(bounds):
            chunk = (end - start) // (2 * self.cp)
            for number in (self.cp_rank, 2 * self.cp - 1 - self.cp_rank):
                held.append(np.arange(start + number * chunk, start + (number + 1) * chunk))
        return np.concatenate(held)


WHOLE = Shard()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the T slots of a pack come from, and which of them a rank holds."""

    bounds: np.ndarray  # [S + 1] first slots, padding sequence included
    sequence: np.ndarray  # [T] int64: which of the S
    position: np.ndarray  # [T] int64 in it
    held: np.ndarray  # [Tc] slots that the model reads on this rank
    own: np.ndarray  # [Tl] those of them that are this rank's in the loss

    @staticmethod
    def of(slots: Sequence[int], shard: Shard) -> Layout:
        """The pack of sequences that take so many slots each (`Shard.slots_for`)."""
        multiple = shard.pack_multiple
        padding = -sum(slots) % multiple if slots else multiple
        lengths = np.array([*slots, padding] if padding else slots, dtype=np.int64)
        bounds = np.concatenate([[0], lengths.cumsum()])
        held = shard.context_slots(bounds)
        return Layout(
            bounds,
            sequence=np.repeat(np.arange(len(lengths)), lengths),
            position=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
            held=held,
            own=held.reshape(shard.tp, -1)[shard.tp_rank],
        )


def pack(
    sequences: Sequence[TrainSequence], weights: Sequence[float] | np.ndarray, *, shard: Shard = WHOLE
) -> MicroBatch:
    """This shard of the sequences end to end, every field aligned with the input token (on the CPU).

    weights [S]: what each loss token of each sequence weighs (`algo.weights.token_weights`). The whole pack is padded
    to a multiple of what the shard needs. No sequences at all give one such multiple of padding with weight 0, for a
    rank that must run without samples. ValueError for a sequence whose fields disagree.
    """
    if len(sequences) != len(weights):
        raise ValueError(f"{len(sequences)} sequences and {len(weights)} weights: one weight for each sequence")
    for sequence in sequences:
        _check(sequence)
    layout = Layout.of([shard.slots_for(len(s.tokens)) for s in sequences], shard)
    bounds, held = layout.bounds, layout.held

    def row(parts: Iterable[np.ndarray], dtype: type, fill: float = 0.0) -> np.ndarray:
        values = np.full(bounds[-1], fill, dtype=dtype)
        for start, part in zip(bounds[:-1], parts, strict=False):
            values[start : start + len(part)] = part
        return values

    masks = [s.loss_mask[1:] for s in sequences]
    mask = row(masks, np.bool_)
    per_loss_token = {
        "loss_mask": mask,
        "weight": row((m * np.float32(w) for m, w in zip(masks, weights, strict=True)), np.float32),
        "advantage": row((np.full(len(m), s.advantage) for m, s in zip(masks, sequences, strict=True)), np.float32),
        "rollout_logp": row((s.rollout_logp[1:] for s in sequences), np.float32),
        "sequence": layout.sequence,
        "position": layout.position,
    }
    return MicroBatch(
        tokens=torch.from_numpy(row((s.tokens[:-1] for s in sequences), np.int64, PAD_TOKEN)[held]),
        targets=torch.from_numpy(row((s.tokens[1:] for s in sequences), np.int64, PAD_TOKEN)[held]),
        position_ids=torch.from_numpy(layout.position[held]),
        wanted=torch.from_numpy(mask[held]),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(np.diff(bounds).max()),
        loss_tokens=torch.tensor([*(int(m.sum()) for m in masks), *[0] * (len(bounds) - 1 - len(masks))]),
        uids=tuple(s.uid for s in sequences),
        slots=tuple(len(m) for m in masks),
        **{name: torch.from_numpy(values[layout.own]) for name, values in per_loss_token.items()},
    )


def sequence_mean(mb: MicroBatch, total: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """The function that replaces each of [Tl] values by the mean over the loss tokens of its own sequence.

    `total` sums [S] tensors over the ranks that hold the other tokens of the micro-batch, differentiably; None when
    there are none. Each loss token gets 1/|y| of the sequence's gradient. Values outside the loss mask do not matter; a
    sequence without loss tokens gives 0.
    """

    def mean(values: Tensor) -> Tensor:
        inside = torch.where(mb.loss_mask, values, torch.zeros_like(values))
        sums = torch.zeros(mb.loss_tokens.numel(), dtype=values.dtype, device=values.device)
        sums = sums.index_add(0, mb.sequence, inside)
        if total is not None:
            sums = total(sums)
        return (sums / mb.loss_tokens.clamp(min=1))[mb.sequence]

    return mean


def pieces(mb: MicroBatch, values: Tensor) -> Pieces:
    """Per-token values [Tl, ...] of this shard by sequence, padding left out; `join` puts all shards' together."""
    host = values.detach().cpu()
    # numpy has no bfloat16
    rows = host.float().numpy() if host.dtype == torch.bfloat16 else host.numpy()
    sequence, position = mb.sequence.cpu().numpy(), mb.position.cpu().numpy()
    found: Pieces = {}
    for number, (uid, slots) in enumerate(zip(mb.uids, mb.slots, strict=True)):
        (here,) = np.nonzero((sequence == number) & (position < slots))
        found[uid] = (position[here], rows[here])
    return found


def all_pieces(micro: Iterable[MicroBatch], values: Iterable[Tensor | None]) -> Pieces:
    """Those of several micro-batches; None: values that another pipeline stage has."""
    found: Pieces = {}
    for mb, value in zip(micro, values, strict=True):
        found |= {} if value is None else pieces(mb, value)
    return found


def join(parts: Iterable[Mapping[int, tuple[np.ndarray, np.ndarray]]]) -> dict[int, np.ndarray]:
    """[n - 1, ...] values of each sequence from the pieces of all ranks, in order of position."""
    by_uid: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for part in parts:
        for uid, piece in part.items():
            by_uid.setdefault(uid, []).append(piece)
    joined = {}
    for uid, found in by_uid.items():
        positions = np.concatenate([p for p, _ in found])
        order = positions.argsort()
        assert (positions[order] == np.arange(len(order))).all(), f"sequence {uid}: positions {positions[order]}"
        joined[uid] = np.concatenate([v for _, v in found])[order]
    return joined


def join_layers(parts: Iterable[tuple[tuple[int, ...], Pieces]], num_layers: int) -> dict[int, np.ndarray]:
    """[n - 1, layers, ...] values of each sequence, from which columns each rank has and their pieces."""
    by_columns: dict[tuple[int, ...], list[Pieces]] = {}
    for columns, found in parts:
        if columns:  # a stage without such layers has nothing to say
            by_columns.setdefault(columns, []).append(found)
    whole: dict[int, np.ndarray] = {}
    for columns, same in by_columns.items():
        for uid, own in join(same).items():
            row = whole.setdefault(uid, np.empty((len(own), num_layers, *own.shape[2:]), dtype=own.dtype))
            row[:, list(columns)] = own
    return whole


def _check(s: TrainSequence) -> None:
    n = len(s.tokens)
    if n < 2:
        raise ValueError(f"sequence {s.uid} has {n} tokens: a prediction needs at least 2")
    if s.loss_mask.shape != (n,) or s.rollout_logp.shape != (n,):
        raise ValueError(
            f"sequence {s.uid}: tokens, loss_mask and rollout_logp have shapes {s.tokens.shape}, {s.loss_mask.shape}, "
            f"{s.rollout_logp.shape}: they must agree"
        )
    if s.loss_mask[0]:
        raise ValueError(f"sequence {s.uid}: loss_mask[0] is True, but nothing predicts the first token")
