"""The unbiased estimator of pass@k, in plain numpy: `megasapo evaluate` starts without torch."""

from __future__ import annotations

import numpy as np


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
