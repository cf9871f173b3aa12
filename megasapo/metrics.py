"""Metric values that know how to merge over micro-batches and ranks.

A metric travels as sums (Mean: weighted sum and weight; Sum; Max; Hist: counts in fixed bins), so that merging is
exact in any order and a mean over ranks is the mean over all tokens, not a mean of means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Mean:
    total: float
    weight: float

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        return self.total / self.weight if self.weight else float("nan")


@dataclass(frozen=True, slots=True)
class Sum:
    total: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def value(self) -> float:
        return self.total


@dataclass(frozen=True, slots=True)
class Max:
    top: float

    def merge(self, other: Max) -> Max:
        return Max(max(self.top, other.top))

    def value(self) -> float:
        return self.top


@dataclass(frozen=True, slots=True)
class Hist:
    """Counts in len(edges) - 1 bins; values outside fall into the first or last. Merging needs equal edges."""

    edges: tuple[float, ...]
    counts: np.ndarray  # [len(edges) - 1] int64

    @staticmethod
    def of(values: np.ndarray, edges: tuple[float, ...]) -> Hist:
        inside = np.clip(values, edges[0], edges[-1])
        return Hist(edges, np.histogram(inside, bins=np.asarray(edges))[0].astype(np.int64))

    def merge(self, other: Hist) -> Hist:
        if self.edges != other.edges:
            raise ValueError(f"histograms with different bins: {self.edges[:3]}... and {other.edges[:3]}...")
        return Hist(self.edges, self.counts + other.counts)


Metric = Mean | Sum | Max | Hist
Metrics = Mapping[str, Metric]


def merge(parts: Iterable[Metrics]) -> dict[str, Metric]:
    """Merge by name; a name present in only some parts is merged over those. Two kinds under one name: TypeError."""
    out: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            seen = out.get(name)
            if seen is not None and type(seen) is not type(metric):
                raise TypeError(f"metric {name} is both {type(seen).__name__} and {type(metric).__name__}")
            out[name] = metric if seen is None else seen.merge(metric)  # type: ignore[arg-type]
    return out


def scalars(metrics: Metrics) -> dict[str, float]:
    """Name to number, histograms left out."""
    return {name: m.value() for name, m in metrics.items() if not isinstance(m, Hist)}
