"""Estimators beside the objectives: KL, train/inference correction, effective sample size, pass@k.

Called by the loss, by reports and by evaluation. Tensors and numbers in and out; no masks over ranks, no config.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megasapo.algo.numerics import LARGEST, MAX_LOG_RATIO, bounded_exp, log_ratio, with_slope


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


def effective_sample_size(log_ratios: Tensor) -> Tensor:
    """(sum r)^2 / (n sum r^2), in (0, 1], of r = exp(log_ratios), for any finite log-ratios; 0-dim."""
    if log_ratios.numel() == 0:
        raise ValueError("the effective sample size of no ratios is not defined")
    r = (log_ratios - log_ratios.max()).exp()
    return r.sum().square() / (r.numel() * r.square().sum())


def pass_at_k(num_samples: int, num_correct: int | np.ndarray, k: int) -> np.ndarray:
    """Unbiased pass@k, 1 - C(n - c, k) / C(n, k), of each problem; float64 in num_correct's shape.

    num_samples n responses a problem, num_correct c of them right (one number or an array). ValueError unless
    1 <= k <= n and 0 <= c <= n.
    """
    correct = np.asarray(num_correct)
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= number of samples, which is {num_samples}")
    if (correct < 0).any() or (correct > num_samples).any():
        raise ValueError(f"num_correct={correct.tolist()} must lie between 0 and num_samples={num_samples}")
    wrong = (num_samples - correct).astype(np.float64)
    # C(w, k) / C(n, k) as a product of k factors; a factor is 0 as soon as fewer than k are wrong.
    none_right = np.ones(correct.shape)
    for j in range(k):
        none_right = none_right * np.maximum(wrong - j, 0.0) / (num_samples - j)
    return 1.0 - none_right
