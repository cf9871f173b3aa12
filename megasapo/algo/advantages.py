"""From rewards of a group to advantages, and DAPO's length penalty on rewards. Plain numpy.

Called when a batch is made. Knows nothing of tokens, packing or ranks.
"""

from __future__ import annotations

import numpy as np

from megasapo.algo.settings import AdvantageKind


def group_advantages(rewards: np.ndarray, kind: AdvantageKind, *, eps: float) -> np.ndarray:
    """Advantages of the samples of each group.

    rewards [..., G] -> [..., G] float32. "group": (R - mean) / (std + eps) with the sample std (over G - 1, as TRL
    and verl); "group_no_std": R - mean; "leave_one_out": R minus the mean of the others; "raw": R. A group whose
    rewards are all equal gives exactly 0 (but for "raw"). ValueError for a reward that is not finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite numbers, got {rewards.tolist()}")
    if kind == "raw":
        return rewards.astype(np.float32)
    size = rewards.shape[-1]
    if size < 2:
        raise ValueError(f"advantage {kind!r} compares samples of one prompt: a group of {size} has nothing to compare")
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    if kind == "leave_one_out":
        centred = centred * (size / (size - 1))
    elif kind == "group":
        centred = centred / (rewards.std(axis=-1, ddof=1, keepdims=True) + eps)
    # The mean of equal numbers need not be that number in floating point: 0 by decision, not by luck.
    return np.where(zero_variance(rewards)[..., None], 0.0, centred).astype(np.float32)


def zero_variance(rewards: np.ndarray) -> np.ndarray:
    """[..., G] -> [...] bool: groups whose rewards are all equal, which teach nothing."""
    rewards = np.asarray(rewards)
    return rewards.max(axis=-1) == rewards.min(axis=-1)


def overlong_penalty(lengths: np.ndarray, *, max_new_tokens: int, penalty_tokens: int) -> np.ndarray:
    """What to add to the reward of a response of each length (DAPO's soft punishment, arXiv 2503.14476 eq. 13).

    lengths: response tokens, any shape. 0 up to max_new_tokens - penalty_tokens, then linear down to -1 at
    max_new_tokens. penalty_tokens 0 is off.
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    if penalty_tokens == 0:
        return np.zeros(lengths.shape, dtype=np.float32)
    if not 0 < penalty_tokens < max_new_tokens:
        raise ValueError(f"penalty_tokens={penalty_tokens} must lie between 0 and max_new_tokens={max_new_tokens}")
    over = lengths - (max_new_tokens - penalty_tokens)
    return np.asarray(-np.clip(over / penalty_tokens, 0.0, 1.0), dtype=np.float32)
