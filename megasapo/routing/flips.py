"""Which expert choices differ between two routings of the same tokens, as sets: the order of the top-k means nothing.

Called by decompose and store. Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Flips:
    """Differences of two routings of N tokens. What is unknown on either side counts as unchanged."""

    num: np.ndarray  # [N, L] uint8: how many of the K choices are not among the other's
    known: np.ndarray  # [N, L] bool
    token: np.ndarray  # of every expert that came or went: which of the N tokens,
    layer: np.ndarray  # which of the L layers,
    expert: np.ndarray  # and which expert

    @property
    def layers_changed(self) -> np.ndarray:
        """[N] int64: MoE layers whose set of experts changed."""
        return np.count_nonzero(self.num, axis=1)


def flips(before: np.ndarray, after: np.ndarray) -> Flips:
    """Compare two [N, L, K] arrays of expert ids, -1 in all K places where unknown.

    Every choice with every other, plane by plane: K^2 comparisons of whole arrays are faster than sorting rows of K.
    """
    dtype = np.result_type(before, after)
    old, new = (np.ascontiguousarray(np.moveaxis(ids, -1, 0), dtype=dtype) for ids in (before, after))  # [K, N, L]
    known = (old[0] >= 0) & (new[0] >= 0)
    stayed, was_there = np.zeros(old.shape, dtype=bool), np.zeros(new.shape, dtype=bool)
    for i in range(len(old)):
        for j in range(len(new)):
            same = old[i] == new[j]
            stayed[i] |= same
            was_there[j] |= same
    went, came = known & ~stayed, known & ~was_there
    # flat places in [K, N, L]: finding them is ten times faster than in three dimensions
    places = [np.flatnonzero(mask) for mask in (went, came)]
    token, layer = np.divmod(np.concatenate(places) % max(known.size, 1), max(known.shape[1], 1))
    return Flips(
        num=went.sum(axis=0, dtype=np.uint8),
        known=known,
        token=token,
        layer=layer,
        expert=np.concatenate([ids.ravel()[at] for ids, at in zip((old, new), places)]).astype(np.int64),
    )
