"""SAPO against the numbers written in the algorithm's definition, and against TRL's implementation."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from megasapo.algo import objectives

TAU = {"tau_pos": 1.0, "tau_neg": 1.05}


def at_ratio(ratio, advantage=1.0, dtype=torch.float64, **tau):
    """loss, gradient with respect to logp, statistics, at given ratios."""
    ratio = torch.as_tensor(ratio, dtype=dtype)
    logp = ratio.log().requires_grad_()
    loss, stats = objectives.sapo(logp, torch.zeros_like(logp), torch.full_like(ratio, advantage), **{**TAU, **tau})
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    return loss.detach(), grad, stats


@pytest.mark.parametrize(
    ("ratio", "gate"),
    [(0.0, 0.786), (0.8, 0.990), (1.0, 1.0), (1.2, 0.990), (2.0, 0.786), (3.0, 0.420), (5.0, 0.071), (10.0, 0.0005)],
)
def test_gate_at_written_ratios(ratio, gate):
    _, _, stats = at_ratio([ratio])
    assert stats["gate"].item() == pytest.approx(gate, abs=5e-4 if ratio < 10 else 5e-5)


@pytest.mark.parametrize(("advantage", "peak", "where"), [(1.0, 1.575, 2.06), (-1.0, 1.536, 1.99)])
def test_gradient_is_bounded_at_written_maximum(advantage, peak, where):
    ratios = torch.linspace(0.01, 60, 60000, dtype=torch.float64)
    _, grad, _ = at_ratio(ratios, advantage)
    size = grad.abs()
    assert size.max().item() == pytest.approx(peak, abs=5e-4)
    assert ratios[size.argmax()].item() == pytest.approx(where, abs=6e-3)


@pytest.mark.parametrize("tau", [0.1, 1.0, 1.05, 10.0])
def test_on_policy_gradient_is_the_advantage(tau):
    for advantage in (2.5, -0.5):
        _, grad, stats = at_ratio([1.0], advantage, tau_pos=tau, tau_neg=tau)
        assert grad.item() == -advantage
        assert stats["gate"].item() == 1.0


def test_loss_value_is_not_centred():
    for advantage, tau in ((1.0, 1.0), (-1.0, 1.05)):
        loss, _, _ = at_ratio([1.0, math.inf], advantage)
        assert loss.tolist() == pytest.approx([-2 / tau * advantage, -4 / tau * advantage], rel=1e-12)


def test_gradient_at_large_ratios_keeps_its_digits_in_fp32():
    # sigmoid saturates in fp32 from r = 18 on; the gradient is still 4 exp(-tau (r - 1)) r to first order
    ratios = [12.0, 20.0, 40.0, 60.0]
    _, grad, _ = at_ratio(ratios, dtype=torch.float32)
    expected = [-r / math.cosh((r - 1) / 2) ** 2 for r in ratios]
    assert grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("d", [100.0, 1e30, math.inf, -100.0, -1e30, -math.inf])
def test_extreme_log_ratio_gives_the_limit_and_no_gradient(d):
    for advantage, tau in ((1.5, 1.0), (-1.5, 1.05)):
        logp = torch.tensor([min(d, 0.0)], requires_grad=True)
        loss, _ = objectives.sapo(logp, torch.tensor([min(-d, 0.0)]), torch.tensor([advantage]), **TAU)
        loss.sum().backward()
        limit = 4 / tau if d > 0 else 4 / tau / (1 + math.exp(tau))
        assert loss.item() == pytest.approx(-limit * advantage, rel=1e-6)
        assert abs(logp.grad.item()) < 1e-30


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float64", "float32"), ("bfloat16", "float64")])
def test_equal_infinities_have_no_gradient_whatever_their_widths(dtypes):
    logp = torch.tensor([-math.inf, -1.0], dtype=getattr(torch, dtypes[0]), requires_grad=True)
    old = torch.tensor([-math.inf, -1.0], dtype=getattr(torch, dtypes[1]))
    loss, stats = objectives.sapo(logp, old, torch.tensor([3.0, 3.0]), **TAU)
    loss.sum().backward()
    assert loss.tolist() == [-6.0, -6.0]
    assert logp.grad.tolist() == [0.0, -3.0]
    assert stats["log_ratio"].tolist() == [0.0, 0.0]


def test_mean_gate_of_a_sequence_is_that_of_its_geometric_mean_ratio():
    torch.manual_seed(0)
    for tau, mean, spread in ((1.0, -0.01, 0.02), (1.05, -0.05, 0.05), (1.0, -0.2, 0.1)):
        d = mean + spread * torch.randn(4000, dtype=torch.float64)
        _, _, stats = at_ratio(d.exp(), tau_pos=tau)
        of_sequence = 1 / math.cosh(tau / 2 * d.mean().item()) ** 2
        assert abs(stats["gate"].mean().item() - of_sequence) <= tau**2 / 4 * (
            d.var(correction=0).item() + 0.02 * mean**2
        )


def test_zero_temperature_is_refused():
    with pytest.raises(ValueError, match="tau_neg=0"):
        objectives.sapo(torch.zeros(1), torch.zeros(1), torch.ones(1), tau_pos=1.0, tau_neg=0)


def trl_loss(loss_type, logp, old_logp, advantages, mask, level="token", **ranges):
    """TRL's own loss code with just enough of a trainer around it: its reduced loss, differentiable in logp."""
    trl = pytest.importorskip("trl", reason="trl is installed with the dev extra")
    identity = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    trainer = SimpleNamespace(
        args=SimpleNamespace(sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, delta=None, steps_per_generation=1),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0, use_vllm=False,
        importance_sampling_level=level, loss_type=loss_type, current_gradient_accumulation_steps=1,
        max_completion_length=logp.shape[1], _entropy_bonus_enabled=False, accelerator=identity,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        epsilon_low=ranges.get("clip_low", 0.2), epsilon_high=ranges.get("clip_high", 0.27),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    ids = torch.zeros(logp.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old_logp, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


def a_batch():
    torch.manual_seed(1)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1])[:, None]
    logp = (-torch.rand(4, 7, dtype=torch.float64) - 0.1).requires_grad_()
    old = logp.detach() + 0.4 * torch.randn(4, 7, dtype=torch.float64)
    return logp, old, torch.tensor([1.2, -0.7, 0.0, -2.0], dtype=torch.float64), mask


@pytest.mark.parametrize(
    ("name", "reduction"),
    [("sapo", "sequence"), ("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant"), ("cispo", "token"),
     ("gspo", "sequence")],
)  # fmt: skip
def test_agrees_with_trl(name, reduction):
    logp, old, advantages, mask = a_batch()

    def sequence_mean(x):
        return ((x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(x)

    ranges = {"sapo": {}, "cispo": {"clip_high": 0.2}}.get(name, {"clip_low": 0.1, "clip_high": 0.15})
    settings = TAU if name == "sapo" else ranges | ({"sequence_mean": sequence_mean} if name == "gspo" else {})
    loss, _ = getattr(objectives, name)(logp, old, advantages[:, None], **settings)
    ours = {
        "sequence": lambda: ((loss * mask).sum(1) / mask.sum(1)).mean(),
        "token": lambda: (loss * mask).sum() / mask.sum(),
        "constant": lambda: (loss * mask).sum() / mask.numel(),
    }[reduction]()
    if name == "gspo":
        theirs = trl_loss("grpo", logp, old, advantages, mask, level="sequence", **ranges)
    elif name == "cispo":  # TRL's epsilon_high is the cap itself
        theirs = trl_loss("cispo", logp, old, advantages, mask, clip_high=1 + ranges["clip_high"])
    else:
        theirs = trl_loss(name, logp, old, advantages, mask, **ranges)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-7)  # TRL rounds the temperatures to fp32
    (mine,) = torch.autograd.grad(ours, logp)
    (peers,) = torch.autograd.grad(theirs, logp)
    assert mine.abs().max() > 0
    torch.testing.assert_close(mine, peers, rtol=1e-6, atol=1e-12)
