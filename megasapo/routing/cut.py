"""The part of a routing that one rank replays: the rows of its slots, the columns of its layers, in the smallest type.

Called by the learner, for batches and for scoring. Ids were checked where they came in: by validate.py, by score.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megasapo.routing.validate import UNKNOWN, storage_dtype


def cut_routing(
    rows: Sequence[np.ndarray | None],
    slots: Sequence[int],
    sequence: np.ndarray,
    position: np.ndarray,
    *,
    layers: Sequence[int],
    num_experts: int,
    top_k: int,
) -> np.ndarray:
    """[Tl, L, K] of a rank's slots from the routings of whole sequences.

    rows: of each sequence [at most its slots, all layers, K] integers, row t routes input token t; missing ones, and
    None for a whole sequence, are UNKNOWN. slots: n - 1 of each sequence. sequence, position [Tl]: of the rank's slots,
    as in MicroBatch. layers: which of the rows' layers to keep, [L].
    """
    cut = blank_routing(slots, sequence, position, len(layers), num_experts, top_k)
    for number, row in enumerate(rows):
        if row is not None:
            (here,) = np.nonzero((sequence == number) & (position < len(row)))
            cut[here] = row[position[here]][:, list(layers)]
    return narrowed(cut, num_experts)


def blank_routing(
    slots: Sequence[int], sequence: np.ndarray, position: np.ndarray, num_layers: int, num_experts: int, top_k: int
) -> np.ndarray:
    """[Tl, L, K] int16: UNKNOWN in the slots of sequences; experts in turn in those of padding, to load all alike."""
    real = position < np.array([*slots, 0])[sequence]  # padding of the whole row, if any, is one more sequence
    turn = np.arange(len(real) * num_layers * top_k).reshape(len(real), num_layers, top_k) % num_experts
    return np.where(real[:, None, None], UNKNOWN, turn).astype(np.int16)


def narrowed(routing: np.ndarray, num_experts: int) -> np.ndarray:
    """An int16 routing in `storage_dtype`, unless something in it is UNKNOWN."""
    return routing if (routing < 0).any() else routing.astype(storage_dtype(num_experts))
