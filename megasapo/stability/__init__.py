"""The instability watch: rules over a step's merged metrics (watch.py) and what is done when one fires (guard.py).

train.py makes one Guard. Nothing here knows megatron-core or rollout servers; docs/stability.md is the manual.
"""

from __future__ import annotations

from megasapo.stability.guard import Guard, Unstable
from megasapo.stability.watch import DEFAULT_RULES, Event, Watch, robust_z

__all__ = ["DEFAULT_RULES", "Event", "Guard", "Unstable", "Watch", "robust_z"]
