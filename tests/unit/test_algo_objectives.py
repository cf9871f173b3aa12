"""Every objective against autograd of its plain formula in fp64, and finite wherever the log-ratio goes."""

import math

import pytest
import torch

from megasapo.algo import objectives

TWO_SEQUENCES = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])


def mean_over_sequences(x):
    sums = torch.zeros(2, dtype=x.dtype).index_add(0, TWO_SEQUENCES, x)
    return (sums / torch.bincount(TWO_SEQUENCES))[TWO_SEQUENCES]


CLIP = {"clip_low": 0.2, "clip_high": 0.27}
SETTINGS = {
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "grpo": CLIP,
    "dapo": CLIP,
    "dr_grpo": CLIP,
    "gspo": {"clip_low": 0.02, "clip_high": 0.03, "sequence_mean": mean_over_sequences},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4, "sequence_mean": mean_over_sequences},
    "cispo": {"clip_high": 0.3},
    "reinforce": {},
}


def plain_clipped(r, a, low, high):
    return -torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def plain_gmpo(logp, old, a, clip_low, clip_high, sequence_mean):
    # the paper's: the smaller of r A and clip(r) A per token, as ratios, then their geometric mean
    d, sign = logp - old, a.sign()
    lesser = sign * torch.minimum(sign * d, sign * d.clamp(-clip_low, clip_high))
    return -sequence_mean(torch.where(sign == 0, d, lesser)).exp() * a


PLAIN = {
    "sapo": lambda logp, old, a, tau_pos, tau_neg: torch.where(
        a > 0,
        -4 / tau_pos * torch.sigmoid(tau_pos * ((logp - old).exp() - 1)) * a,
        -4 / tau_neg * torch.sigmoid(tau_neg * ((logp - old).exp() - 1)) * a,
    ),
    **dict.fromkeys(
        ["grpo", "dapo", "dr_grpo"],
        lambda logp, old, a, clip_low, clip_high: plain_clipped((logp - old).exp(), a, clip_low, clip_high),
    ),
    "gspo": lambda logp, old, a, clip_low, clip_high, sequence_mean: plain_clipped(
        sequence_mean(logp - old).exp(), a, clip_low, clip_high
    ),
    "gmpo": plain_gmpo,
    "cispo": lambda logp, old, a, clip_high: -(logp - old).exp().clamp(max=1 + clip_high).detach() * a * logp,
    "reinforce": lambda logp, old, a: -a * logp,
}


def some_tokens(seed, spread, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logp = (-torch.rand(8, generator=generator, dtype=torch.float64) * 3).to(dtype)
    old = (logp.double() + spread * torch.randn(8, generator=generator, dtype=torch.float64)).to(dtype)
    advantages = torch.tensor([[1.3, -0.8], [-2.0, 0.4], [0.0, 1.0]], dtype=dtype)[seed % 3][TWO_SEQUENCES]
    return logp.requires_grad_(), old, advantages


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0])
def test_loss_and_gradient_are_those_of_the_formula(name, spread):
    for seed in range(6):
        logp, old, advantages = some_tokens(seed, spread)
        loss, stats = getattr(objectives, name)(logp, old, advantages, **SETTINGS[name])
        plain = PLAIN[name](logp, old, advantages, **SETTINGS[name])
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
        upstream = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
        (ours,) = torch.autograd.grad(loss, logp, upstream)
        (theirs,) = torch.autograd.grad(plain, logp, upstream)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert not any(s.requires_grad for s in stats.values())
        assert {s.shape for s in stats.values()} == {loss.shape}


@pytest.mark.parametrize("name", ["sapo", "grpo", "gspo", "gmpo"])
def test_gradcheck(name):
    logp, old, advantages = some_tokens(1, 0.3)
    assert torch.autograd.gradcheck(
        lambda x: getattr(objectives, name)(x, old, advantages, **SETTINGS[name])[0], (logp,)
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_low_precision_inputs_are_computed_in_fp32(name):
    logp, old, advantages = some_tokens(4, 0.3, torch.bfloat16)
    loss, _ = getattr(objectives, name)(logp, old, advantages, **SETTINGS[name])
    exact, _ = getattr(objectives, name)(logp.double(), old.double(), advantages.double(), **SETTINGS[name])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert logp.grad.dtype == torch.bfloat16


def test_gspo_gradient_is_shared_by_the_tokens_of_a_sequence():
    logp, old, advantages = some_tokens(1, 0.001)
    loss, stats = objectives.gspo(logp, old, advantages, **SETTINGS["gspo"])
    (grad,) = torch.autograd.grad(mean_over_sequences(loss)[[0, 5]].sum(), logp)
    s = mean_over_sequences(logp.detach() - old).exp()
    torch.testing.assert_close(grad, -s * advantages / torch.tensor([5.0] * 5 + [3.0] * 3, dtype=torch.float64))
    assert not stats["clipped"].any()


def test_clipping_follows_the_sign_of_the_advantage():
    r = torch.tensor([0.5, 0.79, 1.0, 1.28, 5.0])
    for advantage, expected in ((1.0, [0, 0, 0, 1, 1]), (-1.0, [1, 1, 0, 0, 0])):
        logp = r.log().requires_grad_()
        loss, stats = objectives.grpo(logp, torch.zeros(5), torch.full((5,), advantage), **CLIP)
        loss.sum().backward()
        assert stats["clipped"].int().tolist() == expected
        torch.testing.assert_close(logp.grad, -advantage * r * (1 - torch.tensor(expected)))


EXTREMES = [0.0, 1e-30, 1e-3, 17.0, 20.0, 79.0, 81.0, 88.0, 89.0, 100.0, 710.0, 1e4, 1e30, 3e38, math.inf]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_finite_at_any_log_ratio(name, dtype):
    for d in [*EXTREMES, *(-x for x in EXTREMES)]:
        for advantage in (1.5, -1.5, 0.0):
            # one extreme token among ordinary ones in the first sequence, all three of the second
            d_token = torch.tensor([d, 0.1, -0.1, 0.0, 0.2, d, d, -d], dtype=torch.float64)
            logp = d_token.clamp(max=0).to(dtype).requires_grad_()
            old = (-d_token).clamp(max=0).to(dtype)
            loss, stats = getattr(objectives, name)(logp, old, torch.full((8,), advantage), **SETTINGS[name])
            (loss / 8).sum().backward()
            assert torch.isfinite(loss).all(), (d, advantage, loss)
            assert torch.isfinite(logp.grad).all(), (d, advantage, logp.grad)
            assert torch.isfinite(stats["ratio"]).all(), (d, advantage, stats)


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_infinities_are_no_change_and_nan_is_not_hidden(name):
    old = torch.tensor([-math.inf, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    logp = old.clone().requires_grad_()
    loss, stats = getattr(objectives, name)(logp, old, torch.ones(8), **SETTINGS[name])
    assert torch.isfinite(loss).all()
    assert stats["log_ratio"][0] == 0
    broken, _ = getattr(objectives, name)(torch.full((8,), math.nan), old, torch.ones(8), **SETTINGS[name])
    assert torch.isnan(broken).all()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(3,\) and old_logp \(2,\)"):
        objectives.reinforce(torch.zeros(3), torch.zeros(2), torch.zeros(3))


def test_zero_advantage_is_never_clipped_and_beyond_the_held_ratio_there_is_no_gradient():
    d = torch.tensor([-5.0, 5.0, 79.0, 81.0], requires_grad=True)
    _, stats = objectives.grpo(d, torch.zeros(4), torch.zeros(4), **CLIP)
    assert not stats["clipped"].any()
    loss, _ = objectives.grpo(d, torch.zeros(4), torch.full((4,), -1.0), **CLIP)
    loss.sum().backward()
    assert d.grad.tolist() == pytest.approx([0, math.exp(5), math.exp(79), 0], rel=1e-5)
