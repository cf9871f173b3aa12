"""The policy objectives: SAPO and the baselines it is compared with, as losses per token.

Called by `megasapo.algo.loss`. Each function takes logp, old_logp and advantages of one shape (advantages may
broadcast) and returns the loss (minimised, not reduced, same shape, at least fp32) and detached per-token statistics.
Normalisation, masks, configuration and process groups are elsewhere. Formulas: docs "The algorithm, exactly".

Every loss and gradient is finite for any log-ratio, +-inf included. Where a plain formula is itself infinite the
log-ratio is held at MAX_LOG_RATIO = 80 with gradient 0 beyond it. A NaN log-probability stays NaN, to be noticed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megasapo.algo.numerics import (
    at_least_fp32,
    bounded_exp,
    finite,
    finite_log_ratio,
    log_ratio,
    same_width,
    with_slope,
)
from megasapo.algo.scales import MAX_LOG_RATIO

Stats = dict[str, Tensor]
SequenceMean = Callable[[Tensor], Tensor]
"""Per-token values -> mean over the loss tokens of each token's own sequence, broadcast back; differentiable."""


def sapo(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, tau_pos: float, tau_neg: float) -> tuple[Tensor, Stats]:
    """Soft gate: -(4/tau) sigmoid(tau (r - 1)) A, whose gradient is -sech^2(tau (r - 1) / 2) r A.

    tau is tau_pos where A > 0, else tau_neg. The gradient vanishes for r -> 0 and r -> inf. Statistics: log_ratio,
    ratio, gate (w). arXiv 2511.20347.
    """
    if tau_pos <= 0 or tau_neg <= 0:
        raise ValueError(f"tau_pos={tau_pos}, tau_neg={tau_neg}: both temperatures must be positive")
    _check_shapes(logp, old_logp)
    wide, old = same_width(logp, old_logp)
    with torch.no_grad():
        a = advantages.to(wide.dtype)  # left as narrow as it came: broadcasting one value a sequence costs nothing
        tau = torch.where(a > 0, a.new_full((), tau_pos), a.new_full((), tau_neg))
        d, slope_is_off = finite_log_ratio(wide, old)
        ratio = d.clamp(max=MAX_LOG_RATIO).exp_()
        x = (ratio - 1).mul_(tau)
        p = x.sigmoid()
        gate = x.neg_().sigmoid_().mul_(p).mul_(4)  # 4 p (1 - p), where 1 - p would be rounded to 0 from r = 17 on
        slope = (gate * ratio).mul_(-a)
        slope.addcmul_(slope, slope_is_off, value=-1)
    loss = with_slope(wide, p.mul_(-4 / tau * a), slope)
    return loss, {"log_ratio": d, "ratio": ratio, "gate": gate}


def grpo(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Stats]:
    """Clipped surrogate: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    With A < 0 the plain formula is infinite for r -> inf: r is held at exp(80), gradient 0 beyond. Statistics:
    log_ratio, ratio, clipped.
    """
    d, a = _inputs(logp, old_logp, advantages)
    loss, clipped = _clipped_surrogate(d, a, clip_low, clip_high)
    return loss, {"log_ratio": d.detach(), "ratio": bounded_exp(d.detach()), "clipped": clipped}


def dapo(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Stats]:
    """DAPO's objective is GRPO's with a wider upper range; token mean, refilling and length shaping are elsewhere."""
    return grpo(logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high)


def dr_grpo(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Stats]:
    """Dr.GRPO's objective is GRPO's; what differs is the advantage (no std) and the normalisation (constant)."""
    return grpo(logp, old_logp, advantages, clip_low=clip_low, clip_high=clip_high)


def gspo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    sequence_mean: SequenceMean,
) -> tuple[Tensor, Stats]:
    """Clipped surrogate on the sequence's s = exp(mean_t d); every token carries it and shares its gradient.

    Infinite d count as +-1e30 in the mean; s is held at exp(80) as in grpo. Statistics: log_ratio, ratio (tokens),
    sequence_log_ratio, clipped.
    """
    d, a = _inputs(logp, old_logp, advantages)
    log_s = sequence_mean(finite(d))
    loss, clipped = _clipped_surrogate(log_s, a, clip_low, clip_high)
    stats = {"log_ratio": d.detach(), "ratio": bounded_exp(d.detach()), "clipped": clipped}
    return loss, stats | {"sequence_log_ratio": log_s.detach()}


def gmpo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    sequence_mean: SequenceMean,
) -> tuple[Tensor, Stats]:
    """Geometric mean over the sequence of the token-clipped ratios, times A.

    The clip is pessimistic, as in GRPO, but on the log-ratio: d <= clip_high where A > 0, d >= -clip_low where A < 0
    (arXiv 2507.20673). The mean is held at exp(80) where A < 0. Statistics as gspo.
    """
    d, a = _inputs(logp, old_logp, advantages)
    held = finite(d)
    token = torch.where(a > 0, held.clamp(max=clip_high), torch.where(a < 0, held.clamp(min=-clip_low), held))
    log_s = sequence_mean(token)
    with torch.no_grad():
        s = bounded_exp(log_s)
        slope = torch.where(log_s > MAX_LOG_RATIO, torch.zeros_like(s), s)
        clipped = ((a > 0) & (held > clip_high)) | ((a < 0) & (held < -clip_low))
    loss = with_slope(log_s, -s * a, -slope * a)
    stats = {"log_ratio": d.detach(), "ratio": bounded_exp(d.detach()), "clipped": clipped}
    return loss, stats | {"sequence_log_ratio": log_s.detach()}


def cispo(logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_high: float) -> tuple[Tensor, Stats]:
    """Clipped importance weight on the score: -sg(min(r, 1 + clip_high)) A logp; no token loses its gradient.

    An infinite logp counts as -1e30 in the value. Statistics: log_ratio, ratio, clipped.
    """
    d, a = _inputs(logp, old_logp, advantages)
    ratio = bounded_exp(d.detach())
    loss = _score(logp, ratio.clamp(max=1 + clip_high) * a)
    return loss, {"log_ratio": d.detach(), "ratio": ratio, "clipped": ratio > 1 + clip_high}


def reinforce(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> tuple[Tensor, Stats]:
    """Plain score function: -A logp. old_logp only feeds the statistics log_ratio and ratio."""
    d, a = _inputs(logp, old_logp, advantages)
    return _score(logp, a), {"log_ratio": d.detach(), "ratio": bounded_exp(d.detach())}


def _inputs(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    _check_shapes(logp, old_logp)
    d = log_ratio(logp, old_logp.detach())
    return d, advantages.detach().to(d.dtype).expand_as(d)


def _check_shapes(logp: Tensor, old_logp: Tensor) -> None:
    if logp.shape != old_logp.shape:
        raise ValueError(f"logp has shape {tuple(logp.shape)} and old_logp {tuple(old_logp.shape)}: they must agree")


def _clipped_surrogate(x: Tensor, a: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) of r = exp(x), and where the clip holds (there the gradient is 0)."""
    with torch.no_grad():
        r = bounded_exp(x)
        above = (a > 0) & (r > 1 + clip_high)
        below = (a < 0) & (r < 1 - clip_low)
        clipped = above | below
        held = r.masked_fill(above, 1 + clip_high).masked_fill(below, 1 - clip_low)
        slope = r.masked_fill(clipped | (x > MAX_LOG_RATIO), 0.0)
    return with_slope(x, -held * a, -slope * a), clipped


def _score(logp: Tensor, coefficient: Tensor) -> Tensor:
    """-coefficient * logp; the gradient is -coefficient even where logp is infinite."""
    wide = at_least_fp32(logp)
    return with_slope(wide, -coefficient * finite(wide.detach()), -coefficient)
