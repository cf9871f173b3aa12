"""Metric values that know how to merge over micro-batches and ranks.

A metric travels as sums (Mean: weighted sum and weight; Variance and EffectiveSampleSize: count, sum, sum of squares;
Hist: counts in fixed bins), so that merging is exact in any order and a mean over ranks is the mean over all tokens,
not a mean of means. While a mini-batch runs the numbers may be 0-dim tensors, so that no micro-batch waits for the
device; `to_host` makes plain picklable numbers of all of them at once, before they are sent to other ranks or read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    Number = float | torch.Tensor
    Counts = np.ndarray | torch.Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """total / weight; NaN when nothing was seen."""

    total: Number
    weight: Number

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")


@dataclass(frozen=True, slots=True)
class Sum:
    total: Number

    def merge(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest value, NaN if one of them is NaN; -inf stands for nothing seen, whose value is NaN."""

    top: Number

    def merge(self, other: Max) -> Max:
        return Max(_larger(self.top, other.top))

    def value(self) -> float:
        top = float(self.top)
        return top if top > float("-inf") else float("nan")


@dataclass(frozen=True, slots=True)
class Variance:
    """Population variance from count, sum and sum of squares, summed in float64. NaN when nothing was seen."""

    count: Number
    total: Number
    total_sq: Number

    def merge(self, other: Variance) -> Variance:
        return Variance(self.count + other.count, self.total + other.total, self.total_sq + other.total_sq)

    def value(self) -> float:
        count = float(self.count)
        if not count:
            return float("nan")
        mean = float(self.total) / count
        spread = float(self.total_sq) / count - mean * mean
        return 0.0 if spread < 0 else spread  # rounding of equal values; NaN passes


@dataclass(frozen=True, slots=True)
class EffectiveSampleSize:
    """(sum r)^2 / (n sum r^2): 1 when all ratios are equal, 1/n when one outweighs the rest. NaN: nothing seen."""

    count: Number
    total: Number
    total_sq: Number

    def merge(self, other: EffectiveSampleSize) -> EffectiveSampleSize:
        return EffectiveSampleSize(self.count + other.count, self.total + other.total, self.total_sq + other.total_sq)

    def value(self) -> float:
        scale = float(self.count) * float(self.total_sq)
        return float(self.total) ** 2 / scale if scale else float("nan")


@dataclass(frozen=True, slots=True)
class Hist:
    """Counts in len(edges) - 1 bins; values outside fall into the first or last. Merging needs equal edges."""

    edges: tuple[float, ...]
    counts: Counts  # [len(edges) - 1] int64

    @staticmethod
    def of(values: np.ndarray, edges: tuple[float, ...]) -> Hist:
        inside = np.clip(values, edges[0], edges[-1])
        return Hist(edges, np.histogram(inside, bins=np.asarray(edges))[0].astype(np.int64))

    @staticmethod
    def of_tensor(values: torch.Tensor, where: torch.Tensor, edges: tuple[float, ...]) -> Hist:
        """The same for a tensor's values where a mask of its shape is true, without waiting for the device.

        NaN is not counted, as in numpy.
        """
        import torch

        inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=values.device)
        bins = torch.bucketize(values.detach().double().flatten(), inner, right=True)
        counted = (where & ~torch.isnan(values)).flatten().long()
        counts = torch.zeros(len(edges) - 1, dtype=torch.int64, device=values.device)
        return Hist(edges, counts.index_add_(0, bins, counted))

    def quantile(self, q: float) -> float:
        """The value below which a share q of the counted ones lies, as if they were spread evenly inside each bin.

        NaN when nothing was seen. Never outside the edges, whatever was counted there.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"quantile {q} is not between 0 and 1")
        counts = np.asarray(self.counts, dtype=np.float64)
        if not counts.any():
            return float("nan")
        ends = np.cumsum(counts)
        target = q * ends[-1]
        seen = np.flatnonzero(counts)
        i = seen[np.searchsorted(ends[seen], target)]
        inside = (target - (ends[i] - counts[i])) / counts[i]
        return float(self.edges[i] + max(inside, 0.0) * (self.edges[i + 1] - self.edges[i]))

    def merge(self, other: Hist) -> Hist:
        if self.edges != other.edges:
            raise ValueError(f"histograms with different bins: {self.edges[:3]}... and {other.edges[:3]}...")
        return Hist(self.edges, self.counts + other.counts)


Metric = Mean | Sum | Max | Variance | EffectiveSampleSize | Hist
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
    """Name to number, histograms left out. NaN means that nothing was seen (or that a NaN was)."""
    return {name: m.value() for name, m in metrics.items() if not isinstance(m, Hist)}


def quantiles(
    metrics: Metrics, hist: str, name: str, levels: Iterable[float] = (0.01, 0.05, 0.5, 0.95, 0.99)
) -> dict[str, float]:
    """{name}_q01 and so on: quantiles of the histogram called `hist`, on the host; NaN of an empty one."""
    found = metrics[hist]
    if not isinstance(found, Hist):
        raise TypeError(f"metric {hist} is a {type(found).__name__}, not a histogram")
    return {f"{name}_q{round(100 * q):02d}": found.quantile(q) for q in levels}


def observed(metrics: Metrics) -> dict[str, float]:
    """As `scalars`, without those that saw nothing: a NaN here was one."""
    return {name: m.value() for name, m in metrics.items() if not isinstance(m, Hist) and _saw_something(m)}


def defined(figures: Mapping[str, float]) -> dict[str, float]:
    """Without those whose NaN says that there was nothing to measure."""
    return {name: x for name, x in figures.items() if not np.isnan(x)}


def to_host(metrics: Metrics) -> dict[str, Metric]:
    """The same metrics with every tensor turned into Python floats or numpy counts, in one copy from the device.

    The result holds only plain data: it pickles, so ranks can exchange it and `merge` what they receive.
    """
    found = [(name, f.name, getattr(m, f.name)) for name, m in metrics.items() for f in fields(m)]
    tensors = [(name, field, value) for name, field, value in found if _is_tensor(value)]
    if not tensors:
        return dict(metrics)
    import torch

    # float64 holds counts exactly up to 2^53.
    flat = torch.cat([value.detach().double().reshape(-1) for _, _, value in tensors]).cpu().numpy()
    changes: dict[str, dict[str, Any]] = {}
    start = 0
    for name, field, value in tensors:
        part = flat[start : start + value.numel()]
        start += value.numel()
        changes.setdefault(name, {})[field] = float(part[0]) if value.dim() == 0 else part.astype(np.int64)
    return {name: replace(m, **changes.get(name, {})) for name, m in metrics.items()}


def _saw_something(metric: Mean | Sum | Max | Variance | EffectiveSampleSize) -> bool:
    match metric:
        case Mean():
            return float(metric.weight) != 0
        case Max():
            return float(metric.top) != float("-inf")
        case Variance() | EffectiveSampleSize():
            return float(metric.count) != 0
    return True


def _is_tensor(value: object) -> bool:
    return hasattr(value, "detach")


def _larger(a: Number, b: Number) -> Number:
    if _is_tensor(a) and _is_tensor(b):
        return a.maximum(b)  # type: ignore[union-attr, arg-type]
    return float(np.maximum(float(a), float(b)))
