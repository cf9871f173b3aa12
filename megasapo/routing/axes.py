"""What a decomposition sums over: terms, signs, bins, routings, layers, experts; shared by the sums and the figures."""

from __future__ import annotations

from dataclasses import dataclass

from megasapo.algo.scales import symmetric_edges

SIGNS = ("positive", "negative", "zero")  # of the advantage
MOVES = ("mismatch", "drift")  # the terms in which experts change
ROUTINGS = ("rollout", "behaviour", "current")
# log-ratios of which counterfactuals are told: all of it; what training without replay sees; what R2 leaves of that
SEEN = ("full", "learner", "R2")
FLIP_EDGES = (0, 1, 2, 3, 5, 9, 17, 33, 65, 129)  # each the first of its bin, the last open
POSITION_EDGES = (0, 16, 64, 256, 1024, 4096, 16384)
TERM_EDGES = symmetric_edges(-7, 2, 10)


@dataclass(frozen=True, slots=True)
class Axes:
    """What the sums are taken over; equal for everything that is merged."""

    terms: tuple[str, ...]
    layers: tuple[int, ...]  # decoder layer numbers of the L MoE layers
    num_experts: int
    sweep_groups: tuple[tuple[int, ...], ...] | None  # decoder layers of the C groups of a sweep
    tau_pos: float
    tau_neg: float

    @property
    def num_moments(self) -> int:
        """1, d, d^2; each term, its square, its product with d."""
        return 3 + 3 * len(self.terms)

    @property
    def flip_edges(self) -> tuple[int, ...]:
        """Only what L layers can reach, mismatch and drift together."""
        return tuple(edge for edge in FLIP_EDGES if edge <= 2 * len(self.layers))
