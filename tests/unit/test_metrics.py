"""Metrics merge to the number of the whole, in any split, as Python numbers and as tensors."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from megasapo.metrics import EffectiveSampleSize, Hist, Max, Mean, Sum, Variance, merge, quantiles, scalars, to_host

EDGES = (-1.0, 0.0, 0.5, 2.0)
# multiples of 1/64: sums are exact in fp64, so that merging must be too
VALUES = np.random.default_rng(0).integers(-128, 128, 300) / 64


def measure(values, number=float):
    n, total, squares = number(len(values)), number(values.sum()), number((values**2).sum())
    return {
        "mean": Mean(total, n),
        "sum": Sum(total),
        "max": Max(number(values.max() if len(values) else -math.inf)),
        "var": Variance(n, total, squares),
        "ess": EffectiveSampleSize(n, total, squares),
    }


def as_tensor(x):
    return torch.tensor(float(x), dtype=torch.float64)


@pytest.mark.parametrize("number", [float, as_tensor])
@pytest.mark.parametrize("cuts", [[], [1], [0, 300], [100, 200], list(range(300))])
def test_any_split_gives_the_whole(number, cuts):
    parts = [measure(part, number) for part in np.split(VALUES, cuts)]
    got = scalars(to_host(merge(parts)))
    expected = {
        "mean": VALUES.mean(),
        "sum": VALUES.sum(),
        "max": VALUES.max(),
        "var": VALUES.var(),
        "ess": VALUES.sum() ** 2 / (300 * (VALUES**2).sum()),
    }
    assert got == scalars(merge([measure(VALUES)]))  # bit for bit
    assert got == pytest.approx(expected, rel=1e-12)


def test_histograms_of_arrays_and_tensors_agree_and_merge():
    whole = Hist.of(VALUES, EDGES)
    assert whole.counts.tolist() == [(VALUES < 0).sum(), ((VALUES >= 0) & (VALUES < 0.5)).sum(), (VALUES >= 0.5).sum()]
    mask = torch.arange(300) % 3 > 0
    masked = Hist.of_tensor(torch.from_numpy(VALUES), mask, EDGES)
    rest = Hist.of_tensor(torch.from_numpy(VALUES), ~mask, EDGES)
    assert to_host({"h": masked})["h"].counts.tolist() == Hist.of(VALUES[mask.numpy()], EDGES).counts.tolist()
    merged = to_host(merge([{"h": masked}, {"h": rest}]))["h"]
    assert merged.counts.dtype == np.int64
    assert merged.counts.tolist() == whole.counts.tolist()
    nan = Hist.of_tensor(torch.tensor([math.nan, 0.0, -9.0, 9.0]), torch.ones(4, dtype=torch.bool), EDGES)
    assert nan.counts.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="different bins"):
        whole.merge(Hist.of(VALUES, (0.0, 1.0)))


def test_quantiles_lie_inside_the_bins():
    hist = Hist((0.0, 1.0, 2.0, 4.0, 8.0), np.asarray([2, 0, 6, 0]))
    assert [hist.quantile(q) for q in (0, 0.125, 0.25, 0.5, 1)] == [0, 0.5, 1, pytest.approx(2 + 2 / 3), 4]
    edges = tuple(np.linspace(-2, 2, 257))
    for q in (0.01, 0.3, 0.5, 0.9):
        assert Hist.of(VALUES, edges).quantile(q) == pytest.approx(np.quantile(VALUES, q), abs=2 / 64)
    assert math.isnan(Hist(EDGES, np.zeros(3)).quantile(0.5))
    with pytest.raises(ValueError, match=r"quantile 1\.5"):
        hist.quantile(1.5)
    assert quantiles({"d": hist}, "d", "ratio/log", (0.05, 0.5)) == {
        "ratio/log_q05": pytest.approx(0.2),
        "ratio/log_q50": pytest.approx(2 + 2 / 3),
    }
    with pytest.raises(TypeError, match="d is a Sum"):
        quantiles({"d": Sum(1.0)}, "d", "ratio/log")


def test_nothing_seen_is_nan():
    empty = {"a": Mean(0.0, 0.0), "b": Max(-math.inf), "c": Variance(0, 0, 0), "d": EffectiveSampleSize(0, 0, 0)}
    assert all(math.isnan(v) for v in scalars(empty).values())
    seen = {"a": Mean(2.0, 1.0), "b": Max(3.0), "c": Variance(1, 2.0, 4.0), "d": EffectiveSampleSize(1, 2.0, 4.0)}
    assert scalars(merge([empty, seen])) == {"a": 2, "b": 3, "c": 0, "d": 1}


def test_nan_is_not_lost_in_a_maximum():
    for number in (float, as_tensor):
        for order in ([math.nan, 1.0], [1.0, math.nan]):
            assert math.isnan(merge([{"m": Max(number(v))} for v in order])["m"].value())


def test_host_values_are_plain_and_travel():
    stats = {"mean": Mean(as_tensor(3), as_tensor(2)), "plain": Sum(5.0), "mixed": Mean(as_tensor(1), 4.0)}
    stats["hist"] = Hist.of_tensor(torch.tensor([0.1, 0.7]), torch.tensor([True, True]), EDGES)
    host = to_host(stats)
    assert type(host["mean"].total) is float
    assert list(host) == list(stats)
    received = pickle.loads(pickle.dumps(host))
    assert scalars(received) == {"mean": 1.5, "plain": 5.0, "mixed": 0.25}
    assert received["hist"].counts.tolist() == [0, 1, 1]
    assert b"torch" not in pickle.dumps(host)


def test_one_name_is_one_kind():
    with pytest.raises(TypeError, match="x is both Mean and Sum"):
        merge([{"x": Mean(1.0, 1.0)}, {"x": Sum(1.0)}])


def test_metrics_do_not_import_torch():
    code = "import sys, megasapo.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
