"""What the sums of a decomposition say: variance shares, flip rates, loads and counterfactuals.

Called by decompose.Decomposition, and by the debugger for its shares. Every figure is defined in docs/routing.md; None
or NaN where it is undefined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megasapo.metrics import EffectiveSampleSize, Hist
from megasapo.routing.axes import MOVES, POSITION_EDGES, ROUTINGS, SEEN, SIGNS, TERM_EDGES, Axes

Sums = Mapping[str, np.ndarray]

LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
ROUNDING = 1e-12  # of a mean square: a variance below it is that of equal numbers


def moments(d: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """[N, num_moments] of log-ratios d [N] and their terms [N, terms]: rows whose sums Moments reads."""
    alone = np.stack([np.ones_like(d), d, d * d], axis=1)
    return np.concatenate([alone, terms, terms * terms, terms * d[:, None]], axis=1)


class Moments:
    """Count, means and (co)variances of d and the terms over a set of tokens, from a row of sums."""

    def __init__(self, row: np.ndarray) -> None:
        k = (len(row) - 3) // 3  # terms
        self.count, self.total, self.square = row[:3]
        terms, squares, products = row[3 : 3 + k], row[3 + k : 3 + 2 * k], row[3 + 2 * k :]
        n = self.count or math.nan
        self.mean, self.term_mean = self.total / n, terms / n
        self.variance = _spread(self.square / n, self.mean**2)
        self.term_variance = np.asarray([_spread(s / n, m**2) for s, m in zip(squares, self.term_mean)])
        self.scale = self.variance * n or math.nan  # sum of squared deviations, NaN where shares are undefined
        self.share = (products - terms * self.mean) / self.scale


def document(axes: Axes, sums: Sums) -> dict[str, Any]:
    """The JSON object of one diagnosed step, without the step itself."""
    whole = Moments(sums["by_sign"].sum(axis=0))
    quantiles = {name: [h.quantile(q) for q in LEVELS] for name, h in histograms(axes, sums).items()}
    quantiles["full"] = quantiles.pop("log_ratio")
    signs = {name: Moments(row) for name, row in zip(SIGNS, sums["by_sign"])}
    counterfactual = _counterfactual(sums)
    rates = {name: dict(zip(MOVES, _per_known(sums, name))) for name in ("changed", "jaccard")}
    return _plain(
        {
            "sequences": int(sums["sequences"]),
            "tokens": int(whole.count),
            "broken_tokens": int(sums["broken"]),
            "terms": list(axes.terms),
            "mean": whole.mean,
            "variance": whole.variance,
            "term_mean": dict(zip(axes.terms, whole.term_mean)),
            "term_variance": dict(zip(axes.terms, whole.term_variance)),
            "share": dict(zip(axes.terms, whole.share)),
            "quantiles": {"levels": LEVELS} | quantiles,
            "by_sign": {
                name: {"tokens": int(m.count), "variance": m.variance, "share": dict(zip(axes.terms, m.share))}
                for name, m in signs.items()
            },
            "by_flips": _bins(axes.flip_edges, sums["by_flips"], whole),
            "by_position": _bins(POSITION_EDGES, sums["by_position"], whole),
            "layers": axes.layers,
            "unknown_rows": 1 - sums["known"][0].sum() / (whole.count * len(axes.layers) or math.nan),
            "flip_rate": rates["changed"],
            "jaccard": rates["jaccard"],
            "sweep": _sweep(axes, sums, whole),
            "experts": _experts(axes, sums, whole),
            "load_entropy": _by_routing(load_entropy, sums),
            "load_imbalance": _by_routing(load_imbalance, sums),
            "ess": EffectiveSampleSize(*sums["ratio"]).value(),
            "counterfactual": dict(zip(SEEN, counterfactual)),
        }
    )


def scalars(axes: Axes, sums: Sums) -> dict[str, float]:
    """The figures of metrics.jsonl; those by layer are means over the MoE layers, of the current routing."""
    whole = Moments(sums["by_sign"].sum(axis=0))
    current = sums["load"][-1]
    out = {"routing/log_ratio_mean": whole.mean, "routing/log_ratio_var": whole.variance}
    out |= {f"routing/var_share_{term}": share for term, share in zip(axes.terms, whole.share)}
    out |= {f"routing/var_{term}": variance for term, variance in zip(axes.terms, whole.term_variance)}
    for name, figure in (("flip_rate", "changed"), ("jaccard", "jaccard")):
        out |= {f"routing/{name}_{move}": row.mean() for move, row in zip(MOVES, _per_known(sums, figure))}
    out |= {
        "routing/load_entropy": load_entropy(current).mean(),
        "routing/load_imbalance": load_imbalance(current).mean(),
        "routing/ess": EffectiveSampleSize(*sums["ratio"]).value(),
        "routing/broken_tokens": float(sums["broken"]),
        "routing/diagnosed_tokens": float(whole.count),
    }
    for seen, figures in zip(SEEN, _counterfactual(sums)):
        out |= {f"counterfactual/{seen}/{name}": value for name, value in figures.items()}
    return {name: float(value) for name, value in out.items()}


def histograms(axes: Axes, sums: Sums) -> dict[str, Hist]:
    """Of log_ratio and of each term."""
    counts = sums["histogram"].astype(np.int64)
    return {name: Hist(TERM_EDGES, row) for name, row in zip(("log_ratio", *axes.terms), counts)}


def load_entropy(choices: np.ndarray) -> np.ndarray:
    """[L] entropy of the experts' shares of choices [L, E], over log E: 1 when all are equally busy."""
    share = _shares(choices)
    logs = np.log(share, where=share > 0, out=np.zeros_like(share))
    return -(share * logs).sum(axis=1) / (math.log(choices.shape[1]) or math.nan)


def load_imbalance(choices: np.ndarray) -> np.ndarray:
    """[L] the busiest expert's share of choices [L, E], times E: 1 when all are equally busy, E when one does all."""
    return _shares(choices).max(axis=1) * choices.shape[1]


def _shares(choices: np.ndarray) -> np.ndarray:
    """[L, E] sums to 1 a layer; NaN for a layer without choices."""
    total = choices.sum(axis=1, keepdims=True)
    return choices / np.where(total, total, math.nan)


def _by_routing(figure: Callable[[np.ndarray], np.ndarray], sums: Sums) -> dict[str, np.ndarray]:
    return {name: figure(choices) for name, choices in zip(ROUTINGS, sums["load"])}


def _per_known(sums: Sums, name: str) -> np.ndarray:
    """[2, L] mean over the tokens whose experts are known on both sides."""
    known = sums["known"]
    return sums[name] / np.where(known, known, math.nan)


def _bins(edges: Sequence[int], rows: np.ndarray, whole: Moments) -> list[dict[str, Any]]:
    """The bins that hold tokens: variance inside of each, and its part of all squared deviations."""
    out = []
    for i, row in enumerate(rows):
        m = Moments(row)
        if m.count:
            deviations = m.square - 2 * whole.mean * m.total + m.count * whole.mean**2
            end = edges[i + 1] if i + 1 < len(edges) else None
            share = deviations / whole.scale
            out.append({"from": edges[i], "to": end, "tokens": int(m.count), "variance": m.variance, "share": share})
    return out


def _sweep(axes: Axes, sums: Sums, whole: Moments) -> dict[str, Any] | None:
    if axes.sweep_groups is None:
        return None
    total, product = sums["sweep"][..., 0], sums["sweep"][..., 1]
    return {
        "groups": [list(group) for group in axes.sweep_groups],
        "share": dict(zip(MOVES, (product - total * whole.mean) / whole.scale)),
    }


def _experts(axes: Axes, sums: Sums, whole: Moments) -> dict[str, Any]:
    """Six digits suffice here, and this is the bulk of the file."""
    share = {}
    for move, (count, term, full, product) in zip(MOVES, sums["flipped"]):
        mean = whole.term_mean[axes.terms.index(move)]
        deviations = product - mean * full - whole.mean * term + count * mean * whole.mean
        share[move] = deviations / whole.scale
    found = {
        "load": _by_routing(_shares, sums),
        "flips": {move: sums["flipped"][i, 0] / (whole.count or math.nan) for i, move in enumerate(MOVES)},
        "share": share,
    }
    return {name: {key: _six_digits(x) for key, x in figures.items()} for name, figures in found.items()}


def _counterfactual(sums: Sums) -> list[dict[str, float]]:
    sign_tokens = sums["by_sign"][:, 0]
    counts = (sign_tokens.sum(), float(sums["sequences"]), sign_tokens[0], sign_tokens[1])
    names = ("grpo_clip_frac", "gspo_clip_frac", "sapo_gate_pos", "sapo_gate_neg")
    return [
        {name: float(total / (count or math.nan)) for name, total, count in zip(names, row, counts)}
        for row in sums["counterfactual"]
    ]


def _spread(mean_square: float, squared_mean: float) -> float:
    """Variance; exactly 0 where it is the rounding of equal numbers."""
    variance = mean_square - squared_mean
    return 0.0 if variance <= ROUNDING * mean_square else float(variance)


def _six_digits(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{x:.6g}") for x in row] for row in values]


def _plain(x: Any) -> Any:
    """Python numbers and lists, None for what is not finite."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    if isinstance(x, np.ndarray | np.floating):
        return _plain(x.tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x
