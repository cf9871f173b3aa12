"""Pictures of diagnosed steps as pixels, for sinks that show images.

Called by train. Draws with matplotlib's own objects, not pyplot: no global state, no display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megasapo.routing.axes import MOVES

MAX_TICKS = 12


def flip_map(documents: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[H, W, 3] uint8: share of changed expert choices by layer and step, of mismatch and of drift side by side.

    `documents` as `store.read_diagnosis` gives them, one or more; only step, layers and flip_rate are read.
    """
    rates = {
        f"{move}: share of expert choices that changed": np.asarray(
            [d["flip_rate"][move] for d in documents], dtype=np.float64
        )
        for move in MOVES
    }
    return heat_map(rates, steps=[d["step"] for d in documents], layers=documents[0]["layers"])


def heat_map(matrices: Mapping[str, np.ndarray], *, steps: Sequence[int], layers: Sequence[int]) -> np.ndarray:
    """[H, W, 3] uint8 with one panel a title: matrices are [steps, layers], drawn with steps to the right.

    Every panel has its own colour scale from 0, as one is often ten times another; NaN is left grey.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for title, matrix in matrices.items():
        if matrix.shape != (len(steps), len(layers)):
            raise ValueError(f"{title}: {matrix.shape} values for {len(steps)} steps and {len(layers)} layers")
    figure = Figure(figsize=(5 * len(matrices), 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for panel, (title, matrix) in zip(panels, matrices.items()):
        panel.set_facecolor("0.8")
        top = matrix[np.isfinite(matrix)].max(initial=0.0) or 1.0
        pixels = panel.imshow(matrix.T, aspect="auto", origin="lower", interpolation="nearest", vmin=0, vmax=top)
        figure.colorbar(pixels, ax=panel)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.set_xticks(*_ticks(steps))
    panels[0].set_ylabel("decoder layer")
    panels[0].set_yticks(*_ticks(layers))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _ticks(names: Sequence[int]) -> tuple[list[int], list[str]]:
    every = -(-len(names) // MAX_TICKS)
    at = list(range(0, len(names), every))
    return at, [str(names[i]) for i in at]
