"""Packing sequences into one row of tokens, and taking per-token values apart again by sequence.

Called when a batch is made and where a loss needs a whole sequence. The layout is `types.MicroBatch`'s. Knows nothing
of ranks; what each sequence weighs is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megasapo.types import MicroBatch, TrainSequence

PAD_TOKEN = 0  # any valid id: padding is masked


def pack(sequences: Sequence[TrainSequence], weights: Sequence[float] | np.ndarray, *, pad_to: int = 1) -> MicroBatch:
    """The sequences end to end, every field aligned with the input token, T a multiple of pad_to (on the CPU).

    weights [S]: what each loss token of each sequence weighs (`algo.weights.token_weights`). No sequences at all give
    pad_to tokens of padding with weight 0, for a rank that must run without samples.
    ValueError for a sequence whose fields disagree.
    """
    if len(sequences) != len(weights):
        raise ValueError(f"{len(sequences)} sequences and {len(weights)} weights: one weight for each sequence")
    if pad_to < 1:
        raise ValueError(f"pad_to={pad_to} must be at least 1")
    for sequence in sequences:
        _check(sequence)
    slots = [len(s.tokens) - 1 for s in sequences]
    padding = -sum(slots) % pad_to if slots else pad_to
    lengths = np.array([*slots, padding] if padding else slots, dtype=np.int64)
    masks = [s.loss_mask[1:] for s in sequences]
    return MicroBatch(
        tokens=_row([s.tokens[:-1] for s in sequences], padding, np.int64, PAD_TOKEN),
        targets=_row([s.tokens[1:] for s in sequences], padding, np.int64, PAD_TOKEN),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        loss_mask=_row(masks, padding, np.bool_, False),
        weight=_row([m * np.float32(w) for m, w in zip(masks, weights, strict=True)], padding, np.float32),
        advantage=_row([np.full(n, s.advantage) for n, s in zip(slots, sequences, strict=True)], padding, np.float32),
        rollout_logp=_row([s.rollout_logp[1:] for s in sequences], padding, np.float32),
        uids=tuple(s.uid for s in sequences),
    )


def sequence_mean(mb: MicroBatch) -> Callable[[Tensor], Tensor]:
    """The function that replaces each of [T] values by the mean over the loss tokens of its own sequence.

    Differentiable: each loss token gets 1/|y| of the sequence's gradient. Values outside the loss mask do not matter;
    a sequence without loss tokens gives 0. For sequences that lie whole in this micro-batch.
    """
    segment = _segments(mb)
    num_sequences = mb.cu_seqlens.numel() - 1
    loss_tokens = torch.zeros(num_sequences, dtype=torch.int64, device=segment.device)
    loss_tokens = loss_tokens.index_add(0, segment, mb.loss_mask.long()).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        inside = torch.where(mb.loss_mask, values, torch.zeros_like(values))
        sums = torch.zeros(num_sequences, dtype=values.dtype, device=values.device).index_add(0, segment, inside)
        return (sums / loss_tokens)[segment]

    return mean


def per_sequence(mb: MicroBatch, values: Tensor) -> dict[int, np.ndarray]:
    """Per-token values [T, ...] as one array [n - 1, ...] for each real sequence, by uid; padding left out."""
    host = values.detach().cpu()
    # numpy has no bfloat16
    rows = host.float().numpy() if host.dtype == torch.bfloat16 else host.numpy()
    bounds = mb.cu_seqlens.tolist()
    return {uid: rows[start:end] for uid, start, end in zip(mb.uids, bounds, bounds[1:], strict=False)}


def _segments(mb: MicroBatch) -> Tensor:
    """[T] int64: the sequence that each token belongs to."""
    lengths = mb.cu_seqlens.diff().long()
    index = torch.arange(lengths.numel(), device=lengths.device)
    return torch.repeat_interleave(index, lengths, output_size=mb.tokens.numel())


def _row(parts: list[np.ndarray], padding: int, dtype: type, fill: float = 0.0) -> Tensor:
    tail: np.ndarray = np.full(padding, fill, dtype=dtype)
    return torch.from_numpy(np.concatenate([*(p.astype(dtype) for p in parts), tail]))


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
