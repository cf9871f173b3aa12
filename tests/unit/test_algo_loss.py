"""The policy loss of a micro-batch: masks, weights, one gradient in any split, and statistics that merge."""

import math

import numpy as np
import pytest
import torch

from megasapo import metrics
from megasapo.algo import estimators, objectives
from megasapo.algo.loss import policy_loss
from megasapo.algo.settings import resolve
from megasapo.algo.weights import token_weights
from megasapo.config import from_dict
from megasapo.data.balance import plan
from megasapo.data.packing import Shard, join, pack, pieces, sequence_mean
from megasapo.types import TrainSequence

OBJECTIVES = ["sapo", "grpo", "gspo", "dapo", "dr_grpo", "cispo", "gmpo", "reinforce"]
V = 11


def settings(**algo):
    cfg = from_dict({"model": {"path": "m"}, "rollout": {"max_new_tokens": 20}, "algo": algo})
    return resolve(cfg.algo, cfg.rollout)


def rows():
    rng = np.random.default_rng(5)
    out = []
    for uid, (prompt, response) in enumerate([(2, 9), (4, 1), (1, 5), (3, 12), (2, 2), (5, 7), (1, 3)]):
        n = prompt + response
        mask = np.arange(n) >= prompt
        if response > 6:
            mask[prompt + 2] = False  # a token in the middle that the environment wrote
        tokens = rng.integers(0, V, n).astype(np.int32)
        out.append(TrainSequence(uid, tokens, mask, -rng.random(n).astype(np.float32) * mask, float(rng.normal())))
    return out


def table(seed, scale=1.0):
    """A bigram model: the logits of the next token given this one."""
    return scale * torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_logp(weights, tokens, targets):
    return weights.log_softmax(-1)[tokens, targets]


def loss_of(algo, mb, model, old, ref):
    logits = model.log_softmax(-1)[mb.tokens]
    return policy_loss(
        algo,
        logp=token_logp(model, mb.tokens, mb.targets),
        old_logp=token_logp(old, mb.tokens, mb.targets),
        rollout_logp=mb.rollout_logp.double(),
        advantages=mb.advantage.double(),
        weight=mb.weight.double(),
        loss_mask=mb.loss_mask,
        sequence_mean=sequence_mean(mb),
        ref_logp=token_logp(ref, mb.tokens, mb.targets),
        entropy=-(logits.exp() * logits).sum(-1),
    )


def step(algo, splits, multiple=1):
    """The summed loss, its gradient and the merged statistics of one optimizer step cut as given."""
    sequences = rows()
    model, old, ref = table(1).requires_grad_(), table(1) + table(2, 0.1), table(3)
    loss_tokens = sum(int(s.loss_mask.sum()) for s in sequences)
    total, parts = 0.0, []
    for indices in splits:
        chosen = [sequences[i] for i in indices]
        weights = token_weights(
            np.array([s.loss_mask.sum() for s in chosen]),
            algo.normalisation,
            num_sequences=len(sequences),
            num_loss_tokens=loss_tokens,
            constant_length=algo.constant_length,
        )
        loss, stats = loss_of(algo, pack(chosen, weights, shard=Shard(rows=multiple)), model, old, ref)
        loss.backward()
        total += loss.item()
        parts.append(metrics.to_host(stats))
    return total, model.grad, metrics.merge(parts)


def by_hand(algo):
    """The same step sequence by sequence, with the plain definition of its normalisation."""
    sequences = rows()
    model, old, ref = table(1).requires_grad_(), table(1) + table(2, 0.1), table(3)
    terms, tokens = [], 0
    for s in sequences:
        ids, mask = torch.from_numpy(s.tokens).long(), torch.from_numpy(s.loss_mask[1:])
        logp, before, reference = (token_logp(w, ids[:-1], ids[1:])[mask] for w in (model, old, ref))
        advantage = torch.full_like(logp, np.float32(s.advantage).item())
        extra = {
            "sapo": {"tau_pos": algo.tau_pos, "tau_neg": algo.tau_neg},
            "cispo": {"clip_high": algo.clip_high},
            "reinforce": {},
        }.get(algo.objective, {"clip_low": algo.clip_low, "clip_high": algo.clip_high})
        if algo.objective in ("gspo", "gmpo"):
            extra["sequence_mean"] = lambda x: x.mean().expand_as(x)
        value, _ = getattr(objectives, algo.objective)(logp, before, advantage, **extra)
        correction = (before - torch.from_numpy(s.rollout_logp[1:]).double()[mask]).exp().clamp(max=algo.tis_cap)
        logits = model.log_softmax(-1)[ids[:-1]]
        entropy = -(logits.exp() * logits).sum(-1)[mask]
        x = reference - logp
        value = value * correction.detach() + algo.kl_coef * (x.exp() - x - 1) - algo.entropy_coef * entropy
        terms.append(value)
        tokens += len(value)
    match algo.normalisation:
        case "sequence":
            loss = torch.stack([t.mean() for t in terms]).mean()
        case "token":
            loss = torch.cat(terms).sum() / tokens
        case "constant":
            loss = torch.cat(terms).sum() / (len(terms) * 20)
    return loss.item(), torch.autograd.grad(loss, model)[0]


SPLITS = {
    "one row": [range(7)],
    "one sequence each": [[i] for i in range(7)],
    "another order": [[6, 0, 3], [2], [5, 1, 4]],
    "a micro-batch without sequences": [[0, 1, 2], [], [3, 4, 5, 6]],
    "three ranks": [m for rank in plan([len(s.tokens) - 1 for s in rows()], 3, 15) for m in rank],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_has_one_gradient_however_it_is_cut(objective):
    algo = settings(objective=objective, kl_coef=0.05, entropy_coef=0.01, tis_cap=1.5)
    expected_loss, expected_grad = by_hand(algo)
    for name, split in SPLITS.items():
        for multiple in (1, 8):
            loss, grad, _ = step(algo, split, multiple)
            # weights are fp32: 6e-8 each
            assert loss == pytest.approx(expected_loss, rel=1e-6, abs=1e-7), name
            torch.testing.assert_close(grad, expected_grad, rtol=2e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_statistics_do_not_depend_on_the_cut(objective):
    algo = settings(objective=objective, kl_coef=0.05)
    _, _, whole = step(algo, SPLITS["one row"])
    for split in SPLITS.values():
        _, _, merged = step(algo, split, multiple=4)
        assert metrics.scalars(merged) == pytest.approx(metrics.scalars(whole), rel=1e-9, abs=1e-15)
        for name, metric in whole.items():
            if isinstance(metric, metrics.Hist):
                assert merged[name].counts.tolist() == metric.counts.tolist()


def flat(objective="sapo", **algo):
    """Arguments of policy_loss for six plain tokens, two of them outside the mask."""
    return settings(objective=objective, **algo), {
        "logp": torch.tensor([9.9, -1.0, -0.5, -2.0, -1.5, 9.9]),
        "old_logp": torch.tensor([9.9, -1.2, -0.5, -1.9, -1.9, 9.9]),
        "rollout_logp": torch.tensor([9.9, -1.25, -0.5, -1.8, -2.0, 9.9]),
        "advantages": torch.tensor([9.9, 1.0, 1.0, -0.5, -0.5, 9.9]),
        "weight": torch.tensor([9.9, 0.25, 0.25, 0.25, 0.25, 9.9]),
        "loss_mask": torch.tensor([False, True, True, True, True, False]),
        "sequence_mean": lambda x: x,
        "ref_logp": torch.tensor([9.9, -1.1, -0.6, -2.0, -1.5, 9.9]),
        "entropy": torch.tensor([9.9, 0.1, 0.2, 0.3, 0.4, 9.9]),
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_tokens_outside_the_mask_contribute_nothing(objective, garbage):
    results = []
    for value in (0.0, garbage):
        algo, args = flat(objective, kl_coef=0.1, entropy_coef=0.1, tis_cap=2.0)
        for name, x in args.items():
            if torch.is_tensor(x) and x.is_floating_point():
                args[name] = torch.where(args["loss_mask"], x, torch.full_like(x, value))
        args["logp"].requires_grad_()
        args["entropy"].requires_grad_()
        loss, stats = policy_loss(algo, **args)
        loss.backward()
        results.append((loss.item(), args["logp"].grad.tolist(), args["entropy"].grad.tolist(), metrics.scalars(stats)))
    assert results[0] == results[1]
    assert results[1][1][0] == results[1][1][5] == 0
    assert results[1][2][0] == results[1][2][5] == 0


def test_statistics_of_a_small_example():
    algo, args = flat(kl_coef=0.1, tis_cap=1.1)
    loss, stats = policy_loss(algo, **args)
    got = metrics.scalars(metrics.to_host(stats))
    d = torch.tensor([0.2, 0.0, -0.1, 0.4], dtype=torch.float64)
    r = d.exp()
    gates = 1 / torch.cosh(torch.tensor([1, 1, 1.05, 1.05]) * (r - 1) / 2) ** 2
    tau = torch.tensor([1, 1, 1.05, 1.05])
    cap = torch.tensor([0.05, 0.0, -0.1, 0.1]).exp().clamp(max=1.1)
    policy = (-4 / tau * torch.sigmoid(tau * (r - 1)) * torch.tensor([1, 1, -0.5, -0.5]) * cap).mean()
    kl = estimators.k3(args["logp"], args["ref_logp"])[1:5].mean()
    x = torch.tensor([0.05, 0.0, -0.1, 0.1], dtype=torch.float64)
    expected = {
        "loss/policy": policy.item(),
        "loss/kl": kl.item(),
        "entropy/mean": 0.25,
        "ratio/log_mean": 0.125,
        "ratio/log_var": d.var(correction=0).item(),
        "ratio/max": math.exp(0.4),
        "ratio/ess": (r.sum() ** 2 / (4 * (r**2).sum())).item(),
        "sapo/gate_mean_pos": gates[:2].mean().item(),
        "sapo/gate_mean_neg": gates[2:].mean().item(),
        "sapo/attenuated_frac": 0.0,
        "mismatch/kl": (x.exp() - x - 1).mean().item(),
        "mismatch/logprob_abs_diff": 0.0625,
        "mismatch/correction_mean": cap.mean().item(),
    }
    assert got == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected["loss/policy"] + 0.1 * expected["loss/kl"], rel=1e-6)


def test_attenuation_and_clipping_are_counted():
    algo, args = flat()
    args["old_logp"] = args["logp"] - torch.tensor([0, 3.0, 2.0, 0.1, 0.2, 0]).exp().log()
    _, stats = policy_loss(algo, **args)
    assert stats["sapo/attenuated_frac"].value() == 0.5  # r = 20 and 7.4
    assert stats["sapo/gate_hist"].counts.sum() == 4
    algo, args = flat("grpo", clip_low=0.05, clip_high=0.1)
    _, stats = policy_loss(algo, **args)
    assert stats["ratio/clip_frac"].value() == 0.5  # r = 1.22 with A > 0, .90 with A < 0; not 1.49 with A < 0
    assert "sapo/gate_mean_pos" not in stats
    assert stats["ratio/log_hist"].counts.sum() == 4


@pytest.mark.parametrize("d", [math.inf, -math.inf, 1e30, 500.0, -500.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_everything_is_finite_with_an_extreme_token(objective, d):
    algo, args = flat(objective, kl_coef=0.1, tis_cap=2.0)
    for name, value in (("logp", min(d, 0.0)), ("old_logp", min(-d, 0.0)), ("ref_logp", -1.0)):
        args[name][2] = value
    args["logp"].requires_grad_()
    loss, stats = policy_loss(algo, **args)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(args["logp"].grad).all()
    assert all(math.isfinite(v) for v in metrics.scalars(metrics.to_host(stats)).values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_micro_batch_without_loss_tokens_still_runs_backward(objective):
    algo = settings(objective=objective)
    mb = pack([], [], shard=Shard(rows=4))
    logp = torch.full((4,), math.nan, requires_grad=True)
    loss, stats = policy_loss(
        algo, logp=logp, old_logp=logp.detach(), rollout_logp=mb.rollout_logp, advantages=mb.advantage,
        weight=mb.weight, loss_mask=mb.loss_mask, sequence_mean=sequence_mean(mb),
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0
    assert logp.grad.tolist() == [0, 0, 0, 0]
    assert all(math.isnan(v) for v in metrics.scalars(metrics.to_host(stats)).values())


def test_masked_importance_drops_tokens_but_not_from_the_weights():
    algo, args = flat("reinforce", tis_mask=(0.95, 1.06))
    args["logp"].requires_grad_()
    policy_loss(algo, **args)[0].backward()
    assert args["logp"].grad.tolist() == pytest.approx([0, -0.25, -0.25, 0, 0, 0])


def test_no_mismatch_is_reported_where_old_logprobs_are_the_servers():
    for old, measured in (("learner", True), ("rollout", False)):
        algo, args = flat(old_logprobs=old)
        _, stats = policy_loss(algo, **args)
        assert ("mismatch/kl" in stats, "mismatch/logprob_abs_diff" in stats) == (measured, measured)


def test_coefficients_without_their_inputs_are_refused():
    algo, args = flat(kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kl_coef=0.1 needs ref_logp"):
        policy_loss(algo, **{**args, "ref_logp": None})
    algo, args = flat(entropy_coef=0.2)
    with pytest.raises(ValueError, match=r"entropy_coef=0.2 needs the entropy"):
        policy_loss(algo, **{**args, "entropy": None})


def test_values_come_back_by_sequence():
    sequences = rows()
    mb = pack(sequences, [0.1] * 7, shard=Shard(rows=16))
    values = join([pieces(mb, mb.targets)])
    assert {uid: v.tolist() for uid, v in values.items()} == {s.uid: s.tokens[1:].tolist() for s in sequences}


def test_gate_means_leave_out_tokens_without_advantage():
    algo, args = flat()
    args["advantages"][4] = 0.0
    _, stats = policy_loss(algo, **args)
    assert stats["sapo/gate_mean_pos"].weight == 2
    assert stats["sapo/gate_mean_neg"].weight == 1
