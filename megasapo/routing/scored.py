"""One response as the diagnosis scored it: log-probabilities of each token under three routings, and their differences.

Made by the learner, read by decompose and store. Numpy only; knows nothing of models or of how scores are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TERMS = ("engine", "mismatch", "update", "drift")
TERMS_WITH_FP8 = ("engine", "fp8", "mismatch", "update", "drift")  # of a learner that quantises
LARGEST_LOGP = 1e6  # beyond it a log-probability is a broken number


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """Slot t holds input token t and predicts token t + 1; theta_0 sampled the response, theta is after the update."""

    uid: int
    tokens: np.ndarray  # [n-1] int32, the token that each slot predicts
    loss_mask: np.ndarray  # [n-1] bool
    advantage: float
    rollout_logp: np.ndarray  # [n-1] float32, of the rollout server
    behaviour_replayed: np.ndarray  # [n-1] float32, l(theta_0, z_roll)
    behaviour: np.ndarray  # [n-1] float32, l(theta_0, z_0)
    current_replayed: np.ndarray  # [n-1] float32, l(theta, z_0)
    current: np.ndarray  # [n-1] float32, l(theta, z(theta))
    routing_rollout: np.ndarray  # [n-1, L, K] expert ids of z_roll; -1 in all K places: unknown
    routing_behaviour: np.ndarray  # [n-1, L, K] of z_0
    routing_current: np.ndarray  # [n-1, L, K] of z(theta)
    # [C+1, n-1] float32, at theta_0: row c holds the layer groups before c at z_roll and leaves the rest free
    mismatch_sweep: np.ndarray | None = None
    drift_sweep: np.ndarray | None = None  # the same at theta, held at z_0
    # [n-1] float32, l(theta_0, z_roll) of a quantising learner with nothing quantised; None: it quantises nothing
    unquantised_replayed: np.ndarray | None = None

    @property
    def term_names(self) -> tuple[str, ...]:
        return TERMS if self.unquantised_replayed is None else TERMS_WITH_FP8

    @property
    def logps(self) -> tuple[str, ...]:
        """The fields between which the terms lie, in their order."""
        return LOGPS if self.unquantised_replayed is None else (LOGPS[0], "unquantised_replayed", *LOGPS[1:])

    def terms(self) -> np.ndarray:
        """[n-1, terms] float64 in the order of `term_names`; their sum is current - rollout_logp."""
        steps = np.stack([getattr(self, name) for name in self.logps]).astype(np.float64)
        with np.errstate(invalid="ignore"):  # inf - inf of a broken token is NaN, as it should be
            return np.diff(steps, axis=0).T

    def counted(self) -> np.ndarray:
        """[n-1] bool: the loss tokens all of whose numbers can be used; the other loss tokens are broken."""
        rows = [getattr(self, name)[None] for name in self.logps]
        rows += [sweep for sweep in (self.mismatch_sweep, self.drift_sweep) if sweep is not None]
        usable = np.ones(len(self.tokens), dtype=bool)
        for row in rows:
            usable &= (np.abs(row) <= LARGEST_LOGP).all(axis=0)  # False for NaN
        return self.loss_mask & usable

    def positions(self) -> np.ndarray:
        """[n-1] int64: place in the response, 0 at its first loss token."""
        first = int(np.argmax(self.loss_mask)) if len(self.loss_mask) else 0
        return np.arange(len(self.loss_mask)) - first


LOGPS = ("rollout_logp", "behaviour_replayed", "behaviour", "current_replayed", "current")


def check(
    sequence: ScoredSequence, terms: tuple[str, ...], num_layers: int, num_experts: int, num_groups: int | None
) -> None:
    """ValueError naming the sequence, the field and the values when terms, shapes, ids or sweeps cannot be right."""
    n = len(sequence.tokens)
    who = f"sequence {sequence.uid}"
    if sequence.term_names != terms:
        raise ValueError(f"{who} has the terms {', '.join(sequence.term_names)}, not {', '.join(terms)}")
    for name in (*sequence.logps, "loss_mask"):
        shape = getattr(sequence, name).shape
        if shape != (n,):
            raise ValueError(f"{who}: {name} has shape {shape}, but there are {n} tokens to predict")
    if not np.isfinite(sequence.advantage):
        raise ValueError(f"{who}: the advantage is {sequence.advantage}")
    top_k = sequence.routing_behaviour.shape[-1]
    for name, lowest in (("routing_rollout", -1), ("routing_behaviour", 0), ("routing_current", 0)):
        ids = getattr(sequence, name)
        if ids.shape != (n, num_layers, top_k):
            raise ValueError(f"{who}: {name} has shape {ids.shape}, not {(n, num_layers, top_k)}")
        if ids.size and not (lowest <= ids.min() and ids.max() < num_experts):
            raise ValueError(f"{who}: {name} has experts {ids.min()} to {ids.max()}, not {lowest} to {num_experts - 1}")
    if num_groups is None:
        return
    for name in ("mismatch_sweep", "drift_sweep"):
        found = getattr(getattr(sequence, name), "shape", None)
        if found != (num_groups + 1, n):
            raise ValueError(f"{who}: {name} has shape {found}, not {(num_groups + 1, n)}")
