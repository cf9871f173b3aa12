"""One micro-batch's policy loss: weights times objective, plus KL and entropy, with statistics that merge.

Called by the learner's step on the tokens it holds. It sums and never divides: weights carry the normalisation, so the
sum over micro-batches and ranks is the loss of the optimizer step. No process group and no packing layout here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasapo.algo import objectives
from megasapo.algo.estimators import k3, masked_importance, mismatch_kl, truncated_importance
from megasapo.algo.numerics import log_ratio
from megasapo.algo.objectives import SequenceMean, Stats
from megasapo.algo.scales import GATE_EDGES, LOG_RATIO_EDGES, MAX_LOG_RATIO
from megasapo.algo.settings import ResolvedAlgo
from megasapo.metrics import EffectiveSampleSize, Hist, Max, Mean, Metric, Variance


def policy_loss(
    algo: ResolvedAlgo,
    *,
    logp: Tensor,
    old_logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    weight: Tensor,
    loss_mask: Tensor,
    sequence_mean: SequenceMean,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Metric]]:
    """Sum over loss tokens of weight * (objective + kl_coef * k3 - entropy_coef * entropy), and statistics.

    Everything is [T]; logp and entropy carry gradient. Tokens outside loss_mask contribute exactly 0 to value and
    gradient whatever they hold, NaN included. The loss is 0-dim, at least fp32, connected to logp even without any
    loss token. Statistics hold 0-dim tensors (`metrics.to_host`). loss/policy and loss/kl are means by weight: the
    terms of the step's loss where its weights sum to one (sequence and token mean).
    ValueError: kl_coef without ref_logp, entropy_coef without entropy.
    """
    if algo.kl_coef and ref_logp is None:
        raise ValueError(f"algo.kl_coef={algo.kl_coef} needs ref_logp, the reference model's log-probabilities")
    if algo.entropy_coef and entropy is None:
        raise ValueError(f"algo.entropy_coef={algo.entropy_coef} needs the entropy of each token")

    def inside(x: Tensor) -> Tensor:
        return torch.where(loss_mask, x, 0.0)

    logp, old_logp, rollout_logp = inside(logp), inside(old_logp), inside(rollout_logp)
    advantages, weight = inside(advantages), inside(weight)
    per_token, token_stats = _objective(algo, logp, old_logp, advantages, sequence_mean)
    stats = _ratio_stats(token_stats, advantages, loss_mask)
    if algo.old_logprobs == "learner":  # else the server's are both, and their difference says nothing
        stats |= _mismatch_stats(old_logp, rollout_logp, loss_mask)
    factor = _correction(algo, old_logp, rollout_logp)
    if factor is not None:
        per_token = per_token * factor
        stats["mismatch/correction_mean"] = _mean(factor, loss_mask)
    stats["loss/policy"] = _mean(per_token, weight)
    if ref_logp is not None:
        kl = k3(logp, inside(ref_logp))
        per_token = per_token + algo.kl_coef * kl
        stats["loss/kl"] = _mean(kl, weight)
    if entropy is not None:
        entropy = inside(entropy)
        if algo.entropy_coef:  # else it is only logged, and backward need not pass through it
            per_token = per_token - algo.entropy_coef * entropy
        stats["entropy/mean"] = _mean(entropy, loss_mask)
    return (weight * per_token).sum(), stats


def _objective(
    algo: ResolvedAlgo, logp: Tensor, old_logp: Tensor, advantages: Tensor, sequence_mean: SequenceMean
) -> tuple[Tensor, Stats]:
    args = (logp, old_logp, advantages)
    low, high = algo.clip_low, algo.clip_high
    match algo.objective:
        case "sapo":
            return objectives.sapo(*args, tau_pos=algo.tau_pos, tau_neg=algo.tau_neg)
        case "reinforce":
            return objectives.reinforce(*args)
        case "cispo":
            return objectives.cispo(*args, clip_high=_bound(high))
        case "grpo" | "dapo" | "dr_grpo":  # one formula: they differ in ranges, advantage and weights
            return objectives.grpo(*args, clip_low=_bound(low), clip_high=_bound(high))
        case "gspo":
            return objectives.gspo(*args, clip_low=_bound(low), clip_high=_bound(high), sequence_mean=sequence_mean)
        case "gmpo":
            return objectives.gmpo(*args, clip_low=_bound(low), clip_high=_bound(high), sequence_mean=sequence_mean)
    raise ValueError(f"unknown objective {algo.objective!r}")


def _bound(value: float | None) -> float:
    assert value is not None, "a clipped objective without a range: make ResolvedAlgo with `resolve`"
    return value


def _correction(algo: ResolvedAlgo, old_logp: Tensor, rollout_logp: Tensor) -> Tensor | None:
    if algo.tis_cap is not None:
        return truncated_importance(old_logp, rollout_logp, algo.tis_cap)
    if algo.tis_mask is not None:
        return masked_importance(old_logp, rollout_logp, *algo.tis_mask)
    return None


def _ratio_stats(token: Stats, advantages: Tensor, mask: Tensor) -> dict[str, Metric]:
    # held within +-80, so that one broken token cannot make the logged numbers infinite; fp64, so that sums of squares
    # of nearly equal values keep their digits and merge to the same number in any split
    d = token["log_ratio"].double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    inside = mask.double()
    r = d.exp().mul_(inside)
    count = inside.sum()
    stats: dict[str, Metric] = {
        "ratio/log_mean": _mean(d, inside),
        "ratio/log_var": Variance(count, d.sum(), d.dot(d)),  # d is 0 outside the mask
        "ratio/max": Max(torch.where(mask, r, float("-inf")).max()),
        "ratio/ess": EffectiveSampleSize(count, r.sum(), r.dot(r)),
        "ratio/log_hist": Hist.of_tensor(d, mask, LOG_RATIO_EDGES),
    }
    if "clipped" in token:
        stats["ratio/clip_frac"] = _mean(token["clipped"], inside)
    if "gate" in token:
        gate = token["gate"]
        stats["sapo/gate_mean_pos"] = _mean(gate, mask & (advantages > 0))
        stats["sapo/gate_mean_neg"] = _mean(gate, mask & (advantages < 0))
        stats["sapo/attenuated_frac"] = _mean(gate < 0.5, inside)
        stats["sapo/gate_hist"] = Hist.of_tensor(gate, mask, GATE_EDGES)
    return stats


def _mismatch_stats(old_logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> dict[str, Metric]:
    difference = log_ratio(old_logp, rollout_logp).double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "mismatch/kl": _mean(mismatch_kl(difference, torch.zeros_like(difference)), mask),
        "mismatch/logprob_abs_diff": _mean(difference.abs(), mask),
    }


def _mean(values: Tensor, weight: Tensor) -> Mean:
    """Weighted mean of detached [T] values, which are finite where the weight is 0 unless a token is broken."""
    weight = weight.detach().double()
    return Mean(values.detach().double().dot(weight), weight.sum())
