"""Estimators beside the objectives: KL and train/inference correction (pass@k is in `passk`, without torch).

Called by the loss. Tensors and numbers in and out; no masks over ranks, no config.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasapo.algo.numerics import LARGEST, bounded_exp, log_ratio, with_slope
from megasapo.algo.scales import MAX_LOG_RATIO


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL of the policy to a reference per token: exp(x) - x - 1 with x = ref_logp - logp; gradient to logp only.

    Same shape, at least fp32, never negative. Finite for any input: x is held within [-1e30, 80], gradient 0 beyond.
    """
    minus_x = log_ratio(logp, ref_logp.detach())
    with torch.no_grad():
        x = (-minus_x).clamp(-LARGEST, MAX_LOG_RATIO)
        growth = x.expm1()
        slope = torch.where(x == -minus_x, -growth, torch.zeros_like(x))
        slope = torch.where(torch.isnan(x), x, slope)
    return with_slope(minus_x, growth - x, slope)


def truncated_importance(old_logp: Tensor, rollout_logp: Tensor, cap: float) -> Tensor:
    """min(c, cap) with c = exp(old_logp - rollout_logp), detached: the factor of truncated importance sampling."""
    return bounded_exp(log_ratio(old_logp, rollout_logp).detach()).clamp(max=cap)


def masked_importance(old_logp: Tensor, rollout_logp: Tensor, low: float, high: float) -> Tensor:
    """1 where c = exp(old_logp - rollout_logp) lies in [low, high], else 0."""
    c = bounded_exp(log_ratio(old_logp, rollout_logp).detach())
    return ((c >= low) & (c <= high)).to(c.dtype)


def mismatch_kl(old_logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """KL(rollout || learner) at the behaviour weights, per token, by k3: exp(x) - x - 1, x = old_logp - rollout_logp.

    Tokens are sampled by the rollout server, so the mean over tokens is unbiased. Detached; held as in k3.
    """
    return k3(rollout_logp.detach(), old_logp.detach())
