"""The decomposition against a case worked by hand, a slow formula, megasapo.algo, and what must always hold."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial, reduce

import numpy as np
import pytest
import torch

from megasapo.algo import objectives
from megasapo.routing.axes import FLIP_EDGES, POSITION_EDGES
from megasapo.routing.decompose import Decomposition, ScoredSequence, decompose
from megasapo.routing.flips import flips
from megasapo.routing.scored import LOGPS, TERMS, TERMS_WITH_FP8

TAUS = {"tau_pos": 1.0, "tau_neg": 1.05}
NUM_EXPERTS, GROUPS = 6, ((1, 2), (4,))
decompose_random = partial(decompose, layers=(1, 2, 4), num_experts=NUM_EXPERTS, sweep_groups=GROUPS, **TAUS)


def by_hand() -> ScoredSequence:
    """Four loss tokens after one of the prompt; d = 1, -1/2, 1/4, -3/4, whose mean is 0 and sum of squares 15/8."""
    rollout = np.asarray([np.nan, -4, -3, -2, -1])  # outside the loss mask nothing is read
    engine = np.asarray([0, 1, -1, 1, -1]) / 4
    mismatch = np.asarray([0, 2, -2, 0, 0]) / 4
    update = np.asarray([0, 0, 0, 1, -1]) / 4
    drift = np.asarray([0, 1, 1, -1, -1]) / 4
    logps = rollout + np.cumsum([engine, mismatch, update, drift], axis=0)
    rows = np.asarray([rollout, *logps], dtype=np.float32)
    same, unknown = [[0, 1], [0, 1]], [[-1, -1], [-1, -1]]
    return ScoredSequence(
        uid=7,
        tokens=np.arange(5, dtype=np.int32),
        loss_mask=np.arange(5) > 0,
        advantage=0.5,
        **dict(zip(LOGPS, rows)),
        routing_rollout=np.asarray([same, [[0, 1], [2, 3]], unknown, same, same], dtype=np.int16),
        routing_behaviour=np.asarray([same, [[1, 0], [2, 0]], same, [[2, 3], [0, 1]], same], dtype=np.uint8),
        routing_current=np.asarray([same, [[1, 0], [3, 1]], same, [[2, 3], [1, 0]], [[0, 2], [0, 1]]], dtype=np.uint8),
        mismatch_sweep=np.stack([rows[2], rows[2] - np.float32([0, 0.25, -0.5, 0, 0]), rows[1]]),
        drift_sweep=np.stack([rows[4], rows[3], rows[3]]),
    )


def test_a_case_worked_by_hand() -> None:
    d = decompose([by_hand()], layers=(1, 3), num_experts=4, sweep_groups=((1,), (3,)), **TAUS)
    found = d.to_json()

    def is_(expected: object) -> object:
        if isinstance(expected, list) and isinstance(expected[0], list):
            return [is_(row) for row in expected]
        return pytest.approx(expected, abs=1e-5)  # experts are rounded to six digits

    share = {"engine": 5 / 15, "mismatch": 6 / 15, "update": 2 / 15, "drift": 2 / 15}
    assert (found["sequences"], found["tokens"], found["broken_tokens"]) == (1, 4, 0)
    assert (found["mean"], found["variance"]) == (0, 15 / 32)
    assert found["term_mean"] == dict.fromkeys(TERMS, 0)
    assert found["term_variance"] == {"engine": 1 / 16, "mismatch": 1 / 8, "update": 1 / 32, "drift": 1 / 16}
    assert found["share"] == pytest.approx(share, abs=1e-15)
    assert found["by_sign"]["positive"] == {"tokens": 4, "variance": 15 / 32, "share": found["share"]}
    assert found["by_sign"]["negative"] == {"tokens": 0, "variance": None, "share": dict.fromkeys(TERMS)}
    assert [(b["from"], b["to"], b["tokens"], b["variance"]) for b in found["by_flips"]] == [
        (0, 1, 1, 0),  # the token without known experts
        (1, 2, 2, 1 / 4),
        (2, 3, 1, 0),
    ]
    assert [b["share"] for b in found["by_flips"]] == is_([2 / 15, 5 / 15, 8 / 15])
    assert found["by_position"] == [{"from": 0, "to": 16, "tokens": 4, "variance": 15 / 32, "share": 1}]
    assert found["layers"] == [1, 3]
    assert found["unknown_rows"] == 1 / 4
    assert found["flip_rate"] == {"mismatch": is_([1 / 3, 1 / 6]), "drift": is_([1 / 8, 1 / 4])}
    assert found["jaccard"] == {"mismatch": is_([2 / 3, 7 / 9]), "drift": is_([5 / 6, 3 / 4])}
    assert found["sweep"]["groups"] == [[1], [3]]
    assert found["sweep"]["share"] == {"mismatch": is_([4 / 15, 2 / 15]), "drift": is_([2 / 15, 0])}
    experts = found["experts"]
    assert experts["load"]["rollout"] == is_([[1 / 2, 1 / 2, 0, 0], [1 / 3, 1 / 3, 1 / 6, 1 / 6]])
    assert experts["load"]["current"] == [[3 / 8, 2 / 8, 2 / 8, 1 / 8], [3 / 8, 4 / 8, 0, 1 / 8]]
    assert experts["flips"]["mismatch"] == [[1 / 4] * 4, [1 / 4, 0, 0, 1 / 4]]
    assert experts["flips"]["drift"] == [[0, 1 / 4, 1 / 4, 0], [1 / 4] * 4]
    assert experts["share"]["mismatch"] == [[0] * 4, is_([4 / 15, 0, 0, 4 / 15])]
    assert experts["share"]["drift"] == [is_([0, 0.1, 0.1, 0]), is_([2 / 15] * 4)]
    entropy = (3 * math.log2(8 / 3) + 4 + 3) / 8  # in bits, of 3, 4, 0 and 1 choices
    assert found["load_entropy"]["current"][1] == is_(entropy / 2)
    assert found["load_imbalance"]["current"] == is_([3 / 2, 2])
    # r = 2.718, .607, 1.284, .472: two above 1.27; the sequence's own ratio is 1
    gate = (0.515842 + 0.962273 + 0.980100 + 0.933507) / 4  # 4 p (1 - p), p = sigmoid(r - 1)
    assert found["counterfactual"]["full"] == is_(
        {"grpo_clip_frac": 0.5, "gspo_clip_frac": 0, "sapo_gate_pos": gate, "sapo_gate_neg": None}
    )
    assert found["counterfactual"]["learner"]["grpo_clip_frac"] == 0.5
    assert found["counterfactual"]["R2"]["grpo_clip_frac"] == 0.25
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    scalars = d.scalars()
    assert scalars["routing/var_share_mismatch"] == pytest.approx(0.4)
    assert scalars["routing/flip_rate_drift"] == pytest.approx(3 / 16)
    assert scalars["counterfactual/full/grpo_clip_frac"] == 0.5
    assert math.isnan(scalars["counterfactual/full/sapo_gate_neg"])


def test_fp8_takes_its_part_of_the_engine_and_leaves_the_rest() -> None:
    one, axes = by_hand(), {"layers": (1, 3), "num_experts": 4, "sweep_groups": ((1,), (3,))}
    fp8 = np.asarray([0, 1, 0, 0, -1]) / 4  # of the engine's 1, -1, 1, -1 quarters
    two = dataclasses.replace(one, unquantised_replayed=(one.behaviour_replayed - fp8).astype(np.float32))
    four = decompose([one], **axes, **TAUS)
    five = decompose([two], terms=TERMS_WITH_FP8, **axes, **TAUS)
    before, found = four.to_json(), five.to_json()
    assert found["terms"] == list(found["share"]) == ["engine", "fp8", "mismatch", "update", "drift"]
    share = {"engine": 3 / 30, "fp8": 7 / 30, "mismatch": 12 / 30, "update": 4 / 30, "drift": 4 / 30}
    assert found["share"] == pytest.approx(share, abs=1e-15)
    assert found["by_sign"]["positive"]["share"] == found["share"]
    assert found["term_variance"] == before["term_variance"] | {"engine": 1 / 32, "fp8": 1 / 32}
    about_terms = {"terms", "share", "term_mean", "term_variance", "by_sign", "quantiles"}
    assert {k: v for k, v in found.items() if k not in about_terms} == {
        k: v for k, v in before.items() if k not in about_terms
    }
    assert found["quantiles"].keys() == before["quantiles"].keys() | {"fp8"}
    assert found["quantiles"]["drift"] == before["quantiles"]["drift"]
    more = five.scalars().keys() - four.scalars().keys()
    assert more == {"routing/var_fp8", "routing/var_share_fp8"}
    assert five.scalars()["routing/var_share_fp8"] == pytest.approx(7 / 30)
    assert five.histograms()["routing/fp8_hist"].counts.sum() == 4
    assert "routing/fp8_hist" not in four.histograms()


def test_a_learner_that_does_not_quantise_has_four_terms() -> None:
    found = decompose_random(SEQUENCES)
    terms = [name for name in found.scalars() if name.startswith("routing/var_")]
    shares = [f"routing/var_share_{term}" for term in ("engine", "mismatch", "update", "drift")]
    assert terms == [*shares, *(name.replace("var_share", "var") for name in shares)]
    assert len(found.scalars()) == 2 + 8 + 4 + 5 + 12
    assert found.to_json()["terms"] == ["engine", "mismatch", "update", "drift"]


def random_sequence(uid: int, *, n: int = 40, broken: bool = True, fp8: bool = False) -> ScoredSequence:
    rng = np.random.default_rng(uid)
    steps = rng.normal(0, [[1.0], [0.2], [0.3], [0.1], [0.4]], (5, n))
    logps = np.cumsum(steps, axis=0).astype(np.float32)
    rollout, behaviour, current = (
        np.argsort(rng.random((n, 3, NUM_EXPERTS)), axis=-1)[..., :2].astype(np.int16) for _ in range(3)
    )
    quiet = rng.random((n, 3)) < 0.5
    behaviour[quiet] = rollout[quiet][:, ::-1]  # the same experts in another order
    rollout[rng.random(n) < 0.1] = -1

    def sweep(free: np.ndarray, held: np.ndarray) -> np.ndarray:
        return np.stack([free, rng.normal(free, 0.1).astype(np.float32), held])

    sequence = ScoredSequence(
        uid=uid,
        tokens=rng.integers(0, 99, n).astype(np.int32),
        loss_mask=np.arange(n) >= rng.integers(0, n),
        advantage=float(rng.integers(-1, 2)),
        **dict(zip(LOGPS, logps)),
        routing_rollout=rollout,
        routing_behaviour=behaviour,
        routing_current=current,
        mismatch_sweep=sweep(logps[2], logps[1]),
        drift_sweep=sweep(logps[4], logps[3]),
    )
    if fp8:
        unquantised = logps[1] + rng.normal(0, 0.2, n).astype(np.float32)
        sequence = dataclasses.replace(sequence, unquantised_replayed=unquantised)
    if broken:
        logps[rng.integers(5), rng.integers(n)] = rng.choice([np.nan, np.inf, -np.inf, -1e7])
    return sequence


SEQUENCES = [random_sequence(uid) for uid in range(12)]
WITH_FP8 = [random_sequence(uid, fp8=True) for uid in range(12)]
decompose_fp8 = partial(decompose_random, terms=TERMS_WITH_FP8)


def tokens_of(sequences: list[ScoredSequence]) -> list[dict[str, object]]:
    """One dict a usable loss token, by plain Python."""
    out = []
    for s in sequences:
        first = s.loss_mask.tolist().index(True)
        for t in range(first, len(s.tokens)):
            values = [float(getattr(s, name)[t]) for name in LOGPS]
            values += [*s.mismatch_sweep[:, t].tolist(), *s.drift_sweep[:, t].tolist()]
            if not all(abs(x) <= 1e6 for x in values):
                continue
            z = [
                [set(row) for row in getattr(s, f"routing_{name}")[t].tolist()]
                for name in ("rollout", "behaviour", "current")
            ]
            row = {"d": values[4] - values[0], "position": t - first, "sign": np.sign(s.advantage), "z": z}
            row |= {name: values[i + 1] - values[i] for i, name in enumerate(TERMS)}
            row["sweep"] = {"mismatch": s.mismatch_sweep[:, t].tolist(), "drift": s.drift_sweep[:, t].tolist()}
            row["changes"] = {
                move: [set() if -1 in a | b else a ^ b for a, b in zip(z[i], z[i + 1])]
                for i, move in enumerate(("mismatch", "drift"))
            }
            row["flips"] = sum(bool(change) for move in row["changes"].values() for change in move)
            out.append(row)
    return out


def covariance(x: list[float], y: list[float]) -> float:
    return float(np.cov(x, y, bias=True)[0, 1])


def test_random_data_agrees_with_a_slow_formula() -> None:
    rows, found = tokens_of(SEQUENCES), decompose_random(SEQUENCES).to_json()
    d = [row["d"] for row in rows]
    variance = covariance(d, d)

    def same(value: object, expected: object) -> None:
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-9)

    broken = sum(int(s.loss_mask.sum()) for s in SEQUENCES) - len(rows)
    assert broken > 2
    assert (found["sequences"], found["tokens"], found["broken_tokens"]) == (12, len(rows), broken)
    same(found["variance"], variance)
    same(found["mean"], np.mean(d))
    for term in TERMS:
        values = [row[term] for row in rows]
        same(found["share"][term], covariance(values, d) / variance)
        same((found["term_mean"][term], found["term_variance"][term]), (np.mean(values), np.var(values)))
        for name, sign in (("positive", 1), ("negative", -1), ("zero", 0)):
            some = [row for row in rows if row["sign"] == sign]
            of_d = [row["d"] for row in some]
            same(found["by_sign"][name]["variance"], np.var(of_d))
            same(found["by_sign"][name]["share"][term], covariance([r[term] for r in some], of_d) / np.var(of_d))
    for key, edges in (("flips", FLIP_EDGES), ("position", POSITION_EDGES)):
        for entry in found[f"by_{key}"]:
            assert entry["from"] in edges
            end = math.inf if entry["to"] is None else entry["to"]
            some = [row["d"] for row in rows if entry["from"] <= row[key] < end]
            assert entry["tokens"] == len(some) > 0
            same(entry["variance"], np.var(some))
            same(entry["share"], sum((x - np.mean(d)) ** 2 for x in some) / (len(d) * variance))
        assert sum(entry["tokens"] for entry in found[f"by_{key}"]) == len(rows)
    for i, move in enumerate(("mismatch", "drift")):
        values = [row[move] for row in rows]
        for j in range(3):
            pairs = [(row["z"][i][j], row["z"][i + 1][j]) for row in rows if -1 not in row["z"][i][j]]
            same(found["flip_rate"][move][j], np.mean([len(a - b) / 2 for a, b in pairs]))
            same(found["jaccard"][move][j], np.mean([len(a & b) / len(a | b) for a, b in pairs]))
            for e in range(NUM_EXPERTS):
                mine = [k for k, row in enumerate(rows) if e in row["changes"][move][j]]
                part = sum((values[k] - np.mean(values)) * (d[k] - np.mean(d)) for k in mine) / (len(d) * variance)
                same(found["experts"]["share"][move][j][e], part)
                same(found["experts"]["flips"][move][j][e], len(mine) / len(rows))
        for c in range(2):
            parts = [row["sweep"][move][c] - row["sweep"][move][c + 1] for row in rows]
            same(found["sweep"]["share"][move][c], covariance(parts, d) / variance)
    for i, name in enumerate(("rollout", "behaviour", "current")):
        for j in range(3):
            chosen = [e for row in rows for e in row["z"][i][j] if e >= 0]
            load = [chosen.count(e) / len(chosen) for e in range(NUM_EXPERTS)]
            same(found["experts"]["load"][name][j], load)
            same(found["load_entropy"][name][j], -sum(x * math.log(x) for x in load if x) / math.log(NUM_EXPERTS))
            same(found["load_imbalance"][name][j], max(load) * NUM_EXPERTS)
    r = np.exp(d)
    same(found["ess"], r.sum() ** 2 / (len(r) * (r**2).sum()))


@pytest.mark.parametrize("fp8", [False, True])
def test_shares_add_up(fp8: bool) -> None:
    found = (decompose_fp8(WITH_FP8) if fp8 else decompose_random(SEQUENCES)).to_json()
    assert len(found["share"]) == 4 + fp8
    assert sum(found["share"].values()) == pytest.approx(1, abs=1e-9)
    for part in found["by_sign"].values():
        assert sum(part["share"].values()) == pytest.approx(1, abs=1e-9)
    for bins in (found["by_flips"], found["by_position"]):
        assert sum(b["share"] for b in bins) == pytest.approx(1, abs=1e-9)
    for move in ("mismatch", "drift"):
        assert sum(found["sweep"]["share"][move]) == pytest.approx(found["share"][move], abs=1e-9)


@pytest.mark.parametrize("cuts", [[6], [0, 12], [1, 2, 9]])
def test_parts_merge_to_the_whole(cuts: list[int]) -> None:
    parts = [decompose_random(SEQUENCES[a:b]) for a, b in zip([0, *cuts], [*cuts, 12])]
    merged, whole = reduce(Decomposition.merge, parts), decompose_random(SEQUENCES)
    for name, value in whole.sums.items():
        np.testing.assert_allclose(merged.sums[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
    counts = whole.histograms()["routing/mismatch_hist"].counts
    assert counts.sum() == whole.to_json()["tokens"]
    assert merged.histograms()["routing/mismatch_hist"].counts.tolist() == counts.tolist()


def test_different_axes_do_not_merge() -> None:
    other = decompose([], layers=(1, 2), num_experts=NUM_EXPERTS, **TAUS)
    with pytest.raises(ValueError, match=r"different runs: .*\(1, 2, 4\).*\(1, 2\)"):
        decompose_random([]).merge(other)


def test_different_terms_do_not_merge() -> None:
    with pytest.raises(ValueError, match=r"different runs: .*'engine', 'fp8', 'mismatch'.* and .*'engine', 'mismatch'"):
        decompose_fp8(WITH_FP8).merge(decompose_random(SEQUENCES))
    with pytest.raises(ValueError, match="sequence 0 has the terms engine, mismatch, update, drift, not engine, fp8, "):
        decompose_fp8(SEQUENCES)
    with pytest.raises(ValueError, match=r"sequence 0 has the terms engine, fp8, .*, not engine, mismatch, update"):
        decompose_random(WITH_FP8)


def test_a_leader_without_sequences_merges_with_one_that_has_fp8() -> None:
    merged, whole = decompose_fp8([]).merge(decompose_fp8(WITH_FP8)), decompose_fp8(WITH_FP8)
    assert merged.to_json() == whole.to_json()


def test_five_terms_agree_with_a_slow_formula() -> None:
    rows = []
    for s in WITH_FP8:
        rows += [[float(getattr(s, name)[t]) for name in s.logps] for t in np.flatnonzero(s.counted())]
    steps = np.diff(np.asarray(rows), axis=1)  # in float64
    d = steps.sum(axis=1)
    found = decompose_fp8(WITH_FP8).to_json()
    assert found["tokens"] == len(d) > 100
    for i, term in enumerate(TERMS_WITH_FP8):
        assert found["share"][term] == pytest.approx(covariance(list(steps[:, i]), list(d)) / d.var(), rel=1e-6)
        assert found["term_variance"][term] == pytest.approx(steps[:, i].var(), rel=1e-6)
    for s in WITH_FP8:
        counted = s.counted()
        np.testing.assert_allclose(
            s.terms()[counted].sum(axis=1), s.current[counted] - s.rollout_logp[counted], atol=1e-5
        )


def test_counterfactuals_are_those_of_the_objectives() -> None:
    found = decompose_random(SEQUENCES).to_json()["counterfactual"]
    first = {"full": 0, "learner": 2, "R2": 2}
    last = {"full": 4, "learner": 4, "R2": 3}
    for seen, figures in found.items():
        clipped, sequences, gates = [], [], {1: [], -1: [], 0: []}
        for s in SEQUENCES:
            use = s.counted()
            logp, old = (torch.from_numpy(getattr(s, LOGPS[i][:])[use]).double() for i in (last[seen], first[seen]))
            a = torch.full_like(logp, s.advantage)
            mean = lambda x: x.mean().expand_as(x)  # noqa: E731
            clipped += objectives.grpo(logp, old, a, clip_low=0.2, clip_high=0.27)[1]["clipped"].tolist()
            stats = objectives.gspo(logp, old, a, clip_low=3e-4, clip_high=4e-4, sequence_mean=mean)[1]
            sequences.append(bool(stats["clipped"][0]))
            gates[int(s.advantage)] += objectives.sapo(logp, old, a, **TAUS)[1]["gate"].tolist()
        expected = [np.mean(clipped), np.mean(sequences), np.mean(gates[1]), np.mean(gates[-1])]
        assert list(figures.values()) == pytest.approx(expected, rel=1e-6)
        assert 0 < figures["grpo_clip_frac"] < 1
        assert 0 < figures["gspo_clip_frac"] < 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e7])
@pytest.mark.parametrize("where", [*LOGPS, "mismatch_sweep", "drift_sweep", "unquantised_replayed"])
def test_a_broken_token_is_counted_and_left_out(where: str, value: float) -> None:
    whole = random_sequence(3, broken=False, fp8=True)
    at = len(whole.tokens) - 1
    damaged = getattr(whole, where).copy()
    damaged[..., at] = value
    without = dataclasses.replace(whole, loss_mask=whole.loss_mask & (np.arange(at + 1) != at))
    expected = decompose_fp8([without]).sums
    found = decompose_fp8([dataclasses.replace(whole, **{where: damaged})]).sums
    assert found["broken"] == 1
    for name in expected.keys() - {"broken"}:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_equal_log_ratios_have_no_shares() -> None:
    s = random_sequence(1, broken=False)
    flat = {name: np.full(len(s.tokens), -0.1 * i, dtype=np.float32) for i, name in enumerate(LOGPS)}
    s = dataclasses.replace(s, **flat, advantage=-2.0)
    found = decompose([s], layers=(1, 2, 4), num_experts=NUM_EXPERTS, **TAUS)
    assert found.to_json()["variance"] == 0
    assert found.to_json()["share"] == dict.fromkeys(TERMS)
    assert found.to_json()["sweep"] is None
    assert math.isnan(found.scalars()["routing/var_share_drift"])
    assert found.scalars()["routing/ess"] == pytest.approx(1)


def test_nothing_to_decompose() -> None:
    nothing = dataclasses.replace(random_sequence(1), loss_mask=np.zeros(40, dtype=bool))
    found = decompose_random([nothing])
    assert found.sums["sequences"] == 0
    document = found.to_json()
    assert document["tokens"] == 0
    assert document["variance"] is None
    assert document["flip_rate"] == {"mismatch": [None] * 3, "drift": [None] * 3}
    assert document["by_flips"] == []
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"current": np.zeros(3)}, r"sequence 5: current has shape \(3,\), but there are 40 tokens"),
        ({"advantage": math.nan}, "sequence 5: the advantage is nan"),
        ({"routing_current": np.zeros((40, 2, 2))}, r"routing_current has shape \(40, 2, 2\), not \(40, 3, 2\)"),
        ({"routing_current": np.full((40, 3, 2), 6)}, "routing_current has experts 6 to 6, not 0 to 5"),
        ({"routing_behaviour": np.full((40, 3, 2), -1)}, "routing_behaviour has experts -1 to -1, not 0 to 5"),
        ({"drift_sweep": None}, r"drift_sweep has shape None, not \(3, 40\)"),
        ({"mismatch_sweep": np.zeros((2, 40))}, r"mismatch_sweep has shape \(2, 40\), not \(3, 40\)"),
    ],
)
def test_what_cannot_be_right_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose_random([dataclasses.replace(random_sequence(5, broken=False), **change)])


@pytest.mark.parametrize("num_experts", [8, 256, 300])
def test_flips_are_differences_of_sets(num_experts: int) -> None:
    rng = np.random.default_rng(num_experts)
    dtype = np.uint8 if num_experts <= 256 else np.int16
    old = np.argsort(rng.random((30, 3, num_experts)), axis=-1)[..., :4].astype(dtype)
    new = np.where(rng.random((30, 3, 1)) < 0.5, old[..., ::-1], (old.astype(int) + 1) % num_experts).astype(np.int16)
    new[rng.random((30, 3)) < 0.2] = -1
    found = flips(old, new)
    expected = {
        (t, j, e)
        for t in range(30)
        for j in range(3)
        if new[t, j, 0] >= 0
        for e in set(old[t, j].tolist()) ^ set(new[t, j].tolist())
    }
    triples = list(zip(found.token.tolist(), found.layer.tolist(), found.expert.tolist()))
    assert len(triples) == len(set(triples)) > 20
    assert set(triples) == expected
    assert found.known.tolist() == (new[..., 0] >= 0).tolist()
    assert found.layers_changed.tolist() == [len({j for u, j, _ in expected if u == t}) for t in range(30)]
    assert not flips(old, old[..., ::-1]).num.any()
