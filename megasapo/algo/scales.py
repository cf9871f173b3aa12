"""Bounds and bins of log-ratios, apart from the code that needs torch.

Read by the objectives and their statistics, and by routing, which explains the same log-ratios in numpy.
"""

from __future__ import annotations

# exp(80) = 5.5e34 still fits fp32 with room for an advantage; exp(89) does not.
MAX_LOG_RATIO = 80.0


def symmetric_edges(smallest: int, largest: int, bins_a_decade: int) -> tuple[float, ...]:
    """Bin edges from -10^largest to 10^largest, equally wide in log|x|; the middle bin is |x| < 10^smallest."""
    steps = range(smallest * bins_a_decade, largest * bins_a_decade + 1)
    magnitudes = [10.0 ** (step / bins_a_decade) for step in steps]
    return (*(-m for m in reversed(magnitudes)), *magnitudes)


LOG_RATIO_EDGES = symmetric_edges(-4, 1, 5)
GATE_EDGES = tuple(i / 50 for i in range(51))
