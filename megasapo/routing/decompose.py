"""Where the variance of a step's log-ratios comes from: engine, fp8, mismatch, update and drift, exactly.

Every data-parallel leader decomposes the sequences it holds into sums; the sums of all leaders are merged, and
`figures` turns them into shares. Numpy only: knows nothing of models, processes or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megasapo.algo.scales import MAX_LOG_RATIO
from megasapo.algo.settings import default_clip
from megasapo.metrics import Hist
from megasapo.routing import figures
from megasapo.routing.axes import MOVES, POSITION_EDGES, ROUTINGS, SEEN, SIGNS, TERM_EDGES, Axes
from megasapo.routing.flips import Flips, flips
from megasapo.routing.scored import TERMS, ScoredSequence, check

GRPO_CLIP, GSPO_CLIP = default_clip("grpo"), default_clip("gspo")


@dataclass(frozen=True)
class Decomposition:
    """Sums over loss tokens, float64; `merge` adds those of other sequences."""

    axes: Axes
    sums: Mapping[str, np.ndarray]

    def merge(self, other: Decomposition) -> Decomposition:
        """The decomposition of both's sequences. ValueError when they were taken over different axes."""
        if self.axes != other.axes:
            raise ValueError(f"decompositions of different runs: {self.axes} and {other.axes}")
        return Decomposition(self.axes, {name: value + other.sums[name] for name, value in self.sums.items()})

    def scalars(self) -> dict[str, float]:
        """Name in metrics.jsonl to number; NaN where undefined."""
        return figures.scalars(self.axes, self.sums)

    def histograms(self) -> dict[str, Hist]:
        """Of the log-ratio and of each term."""
        return {f"routing/{name}_hist": hist for name, hist in figures.histograms(self.axes, self.sums).items()}

    def to_json(self) -> dict[str, Any]:
        """Everything, as docs/routing.md describes it; None where undefined."""
        return figures.document(self.axes, self.sums)


def decompose(
    sequences: Iterable[ScoredSequence],
    *,
    layers: tuple[int, ...],
    num_experts: int,
    terms: tuple[str, ...] = TERMS,
    sweep_groups: tuple[tuple[int, ...], ...] | None = None,
    tau_pos: float,
    tau_neg: float,
) -> Decomposition:
    """Sum up scored sequences; none give the empty decomposition, which merges with any other of the same axes.

    `terms`: those of the sequences, TERMS_WITH_FP8 of a learner that quantises.

    A loss token with a log-probability that is NaN, infinite or beyond -1e6 is counted as broken and left out.
    ValueError naming the sequence: other terms, shapes or expert ids that do not fit, a sweep that is missing.
    """
    axes = Axes(terms, layers, num_experts, sweep_groups, tau_pos, tau_neg)
    sums = _zeros(axes)
    for sequence in sequences:
        check(sequence, terms, len(layers), num_experts, None if sweep_groups is None else len(sweep_groups))
        _add(sums, sequence, axes)
    return Decomposition(axes, sums)


def _zeros(axes: Axes) -> dict[str, np.ndarray]:
    num_layers, moves = len(axes.layers), len(MOVES)
    shapes: dict[str, tuple[int, ...]] = {
        "sequences": (),
        "broken": (),
        "by_sign": (len(SIGNS), axes.num_moments),
        "by_flips": (len(axes.flip_edges), axes.num_moments),
        "by_position": (len(POSITION_EDGES), axes.num_moments),
        "histogram": (1 + len(axes.terms), len(TERM_EDGES) - 1),
        "ratio": (3,),  # 1, r, r^2
        "counterfactual": (len(SEEN), 4),  # clipped tokens, clipped sequences, gate where A > 0, where A < 0
        "sweep": (moves, len(axes.sweep_groups or ()), 2),  # a group's contribution, its product with d
        "known": (moves, num_layers),
        "changed": (moves, num_layers),  # share of the K choices that differ
        "jaccard": (moves, num_layers),
        "flipped": (moves, 4, num_layers, axes.num_experts),  # 1, term, d, term * d where an expert came or went
        "load": (len(ROUTINGS), num_layers, axes.num_experts),
    }
    return {name: np.zeros(shape) for name, shape in shapes.items()}


def _add(sums: dict[str, np.ndarray], sequence: ScoredSequence, axes: Axes) -> None:
    counted = sequence.counted()
    sums["broken"] += np.count_nonzero(sequence.loss_mask) - np.count_nonzero(counted)
    if not counted.any():
        return
    sums["sequences"] += 1
    terms = sequence.terms()[counted]  # [N, terms]
    d = terms.sum(axis=1)
    _add_tokens(sums, sequence, axes, d, terms)
    routing = {name: getattr(sequence, f"routing_{name}")[counted] for name in ROUTINGS}  # [N, L, K]
    moved = {
        "mismatch": flips(routing["rollout"], routing["behaviour"]),
        "drift": flips(routing["behaviour"], routing["current"]),
    }
    for i, name in enumerate(MOVES):
        _add_flips(sums, i, moved[name], terms[:, axes.terms.index(name)], d, routing["behaviour"].shape[-1])
    for i, name in enumerate(ROUTINGS):
        sums["load"][i] += _load(routing[name], axes.num_experts)
    rows = figures.moments(d, terms)
    num_flips = moved["mismatch"].layers_changed + moved["drift"].layers_changed
    sums["by_sign"][_sign(sequence.advantage)] += rows.sum(axis=0)
    _add_by(sums["by_flips"], np.digitize(num_flips, axes.flip_edges) - 1, rows)
    _add_by(sums["by_position"], np.digitize(sequence.positions()[counted], POSITION_EDGES) - 1, rows)
    if axes.sweep_groups is not None:
        for i, sweep in enumerate((sequence.mismatch_sweep, sequence.drift_sweep)):
            assert sweep is not None  # checked
            part = -np.diff(sweep[:, counted].astype(np.float64), axis=0)  # [C, N]
            sums["sweep"][i] += np.stack([part.sum(axis=1), part @ d], axis=1)


def _add_tokens(
    sums: dict[str, np.ndarray], sequence: ScoredSequence, axes: Axes, d: np.ndarray, terms: np.ndarray
) -> None:
    """Histograms, effective sample size and counterfactuals."""
    for i, values in enumerate((d, *terms.T)):
        sums["histogram"][i] += Hist.of(values, TERM_EDGES).counts
    r = _ratio(d)
    sums["ratio"] += (len(r), r.sum(), r @ r)
    update, drift = terms[:, axes.terms.index("update")], terms[:, axes.terms.index("drift")]
    for i, seen in enumerate((d, update + drift, update)):
        token_ratio, sequence_ratio = _ratio(seen), _ratio(seen.mean(keepdims=True))
        gates = gate(seen, sequence.advantage, tau_pos=axes.tau_pos, tau_neg=axes.tau_neg).sum()
        sums["counterfactual"][i] += (
            _num_clipped(token_ratio, sequence.advantage, GRPO_CLIP),
            _num_clipped(sequence_ratio, sequence.advantage, GSPO_CLIP),
            gates if sequence.advantage > 0 else 0.0,
            gates if sequence.advantage < 0 else 0.0,
        )


def _add_flips(
    sums: dict[str, np.ndarray], move: int, found: Flips, term: np.ndarray, d: np.ndarray, top_k: int
) -> None:
    num, known = found.num.astype(np.float64), found.known
    sums["known"][move] += known.sum(axis=0)
    sums["changed"][move] += num.sum(axis=0) / top_k
    sums["jaccard"][move] += np.where(known, (top_k - num) / (top_k + num), 0.0).sum(axis=0)
    _, num_layers, num_experts = sums["flipped"][move].shape
    place = found.layer * num_experts + found.expert
    for i, weights in enumerate((None, term, d, term * d)):
        at_flips = None if weights is None else weights[found.token]
        counts = np.bincount(place, at_flips, minlength=num_layers * num_experts)
        sums["flipped"][move, i] += counts.reshape(num_layers, num_experts)


def _add_by(into: np.ndarray, group: np.ndarray, rows: np.ndarray) -> None:
    """Add rows [N, M] to the groups' rows; `group` [N]."""
    for i in np.unique(group):
        into[i] += rows[group == i].sum(axis=0)


def _load(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[L, E] choices of each expert; unknown ones are not counted."""
    num_layers = ids.shape[1]
    place = ids + (np.arange(num_layers, dtype=np.int32) * num_experts)[:, None]
    place = place[ids >= 0] if ids.dtype.kind == "i" else place
    return np.bincount(place.ravel(), minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def _sign(advantage: float) -> int:
    return 0 if advantage > 0 else 1 if advantage < 0 else 2


def _ratio(log_ratio: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _num_clipped(ratio: np.ndarray, advantage: float, clip: tuple[float, float]) -> int:
    """How many lie where the clip changes the gradient, as in algo.objectives."""
    if advantage == 0:
        return 0
    return int(np.count_nonzero(ratio > 1 + clip[1] if advantage > 0 else ratio < 1 - clip[0]))


def gate(log_ratio: np.ndarray, advantage: float, *, tau_pos: float, tau_neg: float) -> np.ndarray:
    """SAPO's w = sech^2(tau (r - 1) / 2) of log-ratios [N] of one sequence; NaN stays NaN."""
    tau = tau_pos if advantage > 0 else tau_neg
    half = np.minimum(tau / 2 * (_ratio(log_ratio) - 1), 300.0)  # cosh(300)^2 still fits float64
    return np.cosh(half) ** -2.0
