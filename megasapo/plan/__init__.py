"""`megasapo plan`: parameters, memory, messages and time of a parallel layout, and the best layouts of a cluster.

Computes from config.json and the configuration alone: no weights, no GPU, no torch. docs/planner.md has the formulas
and says what is exact and what is an estimate.
"""

from __future__ import annotations

from megasapo.plan.command import main

__all__ = ["main"]
