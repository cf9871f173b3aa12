"""Advantages, token weights, KL, importance correction, pass@k and the table of defaults, against written numbers."""

import itertools
import math

import numpy as np
import pytest
import torch

from megasapo.algo import estimators
from megasapo.algo.advantages import group_advantages, overlong_penalty, zero_variance
from megasapo.algo.passk import pass_at_k
from megasapo.algo.settings import resolve
from megasapo.algo.weights import token_weights
from megasapo.config import from_dict


def settings(group_size=8, **algo):
    cfg = from_dict({"model": {"path": "m"}, "rollout": {"group_size": group_size}, "algo": algo})
    return resolve(cfg.algo, cfg.rollout)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group", [1.5, -0.5, -0.5, -0.5]),
        ("group_no_std", [0.75, -0.25, -0.25, -0.25]),
        ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("raw", [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_group_advantages(kind, expected):
    got = group_advantages(np.array([[1.0, 0, 0, 0], [0.1] * 4]), kind, eps=1e-9)
    assert got.dtype == np.float32
    assert got[0] == pytest.approx(expected, rel=1e-6)
    assert got[1] == pytest.approx([0.1] * 4 if kind == "raw" else [0] * 4, abs=0 if kind != "raw" else 1e-7)


def test_equal_rewards_give_exactly_zero_although_their_rounded_mean_differs():
    rewards = np.array([0.1, 0.1, 0.1])
    assert rewards.mean() != 0.1
    for kind in ("group", "group_no_std", "leave_one_out"):
        assert (group_advantages(rewards, kind, eps=1e-30) == 0).all()
    assert zero_variance(np.array([[1.0, 1.0], [1.0, 0.0]])).tolist() == [True, False]


def test_rewards_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="finite"):
        group_advantages(np.array([1.0, math.nan]), "group", eps=1e-6)
    with pytest.raises(ValueError, match="a group of 1"):
        group_advantages(np.array([1.0]), "group", eps=1e-6)


def test_overlong_penalty():
    got = overlong_penalty(np.array([1, 80, 85, 90, 100, 120]), max_new_tokens=100, penalty_tokens=20)
    assert got == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert (overlong_penalty(np.array([1, 100]), max_new_tokens=100, penalty_tokens=0) == 0).all()


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [("sequence", [1 / 12, 1 / 3, 0]), ("token", [0.1, 0.1, 0]), ("constant", [1 / 24, 1 / 24, 0])],
)
def test_token_weights(normalisation, expected):
    # 3 sequences of 4, 1 and 0 tokens here; the other 5 loss tokens of the step lie on other ranks
    got = token_weights(np.array([4, 1, 0]), normalisation, num_sequences=3, num_loss_tokens=10, constant_length=8)
    assert got.dtype == np.float32
    assert got == pytest.approx(expected, rel=1e-6)


def test_counts_of_one_rank_in_place_of_the_sums_are_refused():
    with pytest.raises(ValueError, match="sums over all ranks"):
        token_weights(np.array([4, 4]), "token", num_sequences=2, num_loss_tokens=4, constant_length=1)


def test_k3_is_the_kl_in_expectation():
    torch.manual_seed(0)
    p, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * estimators.k3(p, q)).sum(), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close((p.exp() * estimators.mismatch_kl(q, p)).sum(), exact, rtol=1e-12, atol=0)


def test_k3_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    logp, ref = (3 * torch.randn(2, 30, dtype=torch.float64)).unbind()
    logp.requires_grad_()
    plain = (ref - logp).exp() - (ref - logp) - 1
    torch.testing.assert_close(estimators.k3(logp, ref), plain)
    ours, theirs = (torch.autograd.grad(y.sum(), logp)[0] for y in (estimators.k3(logp, ref), plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("x", [1e-4, 50.0, 100.0, 1e30, math.inf])
def test_k3_is_finite_and_not_negative(x):
    for d in (x, -x):
        logp = torch.tensor([min(d, 0.0)], requires_grad=True)
        kl = estimators.k3(logp, torch.tensor([min(-d, 0.0)]))
        kl.sum().backward()
        assert 0 <= kl.item() < math.inf
        assert math.isfinite(logp.grad.item())
    assert estimators.k3(torch.zeros(1), torch.full((1,), 1e-4)).item() == pytest.approx(5e-9, rel=1e-3)


def test_importance_correction():
    old = torch.tensor([2.0, 1.0, 0.5, 10.0, 0.0]).log()
    rollout = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]).log()  # c = 2, 1, .5, inf, 0
    assert estimators.truncated_importance(old, rollout, 1.5).tolist() == pytest.approx([1.5, 1, 0.5, 1.5, 0])
    assert estimators.masked_importance(old, rollout, 0.75, 2.5).tolist() == [1, 1, 0, 0, 0]


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    n = 6
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        share = sum(any(d) for d in draws) / len(draws)
        assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
        assert share == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))


def test_pass_at_1_is_the_mean_and_arrays_are_taken():
    correct = np.array([[0, 3], [10, 5]])
    assert pass_at_k(10, correct, 1) == pytest.approx(correct / 10)
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5)  # factorials would overflow
    with pytest.raises(ValueError, match="pass@11"):
        pass_at_k(10, 3, 11)
    with pytest.raises(ValueError, match=r"num_correct=\[3, 11\]"):
        pass_at_k(10, np.array([3, 11]), 1)


@pytest.mark.parametrize(
    ("objective", "low", "high", "normalisation", "advantage"),
    [
        ("sapo", None, None, "sequence", "group"),
        ("grpo", 0.2, 0.27, "sequence", "group"),
        ("dapo", 0.2, 0.28, "token", "group"),
        ("dr_grpo", 0.2, 0.27, "constant", "group_no_std"),
        ("gspo", 3e-4, 4e-4, "sequence", "group"),
        ("gmpo", 0.4, 0.4, "sequence", "group"),
        ("cispo", None, 4.0, "token", "group"),
        ("reinforce", None, None, "sequence", "group"),
    ],
)
def test_defaults(objective, low, high, normalisation, advantage):
    got = settings(objective=objective)
    assert (got.clip_low, got.clip_high, got.normalisation, got.advantage) == (low, high, normalisation, advantage)
    assert got.constant_length == got.max_new_tokens == 1024


def test_given_settings_win_over_defaults():
    got = settings(objective="grpo", clip_low=0.0, clip_high=0.5, normalisation="constant", constant_length=7)
    assert (got.clip_low, got.clip_high, got.normalisation, got.constant_length) == (0.0, 0.5, "constant", 7)
    assert settings(objective="sapo", advantage="leave_one_out").advantage == "leave_one_out"
    assert settings(group_size=1, objective="reinforce").advantage == "raw"
    with pytest.raises(ValueError, match=r"algo.clip_low=0.2 .* algo.objective=sapo"):
        settings(objective="sapo", clip_low=0.2)
