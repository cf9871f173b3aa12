"""Scores the samples again: with each set of weights, natural and forced routing, in each layout and dtype asked for.

Called by the debugger on every rank. It knows nothing of what the numbers are compared with.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megasapo.config import Config
from megasapo.debug.samples import Dumped

if TYPE_CHECKING:
    from megasapo.mcore.scorer import Scored, Scorer

ROUTINGS = ("native", "R2", "R3")
UNQUANTISED = "unquantised"  # the run's own settings without its FP8


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to score a sample. R2 forces the experts of the plain native pass with the behaviour weights."""

    against: str  # the settings that differ from the run's own, or UNQUANTISED; "" for none
    weights: str  # "behaviour" or "current"
    routing: str  # one of ROUTINGS

    def __str__(self) -> str:
        return " ".join(part for part in (self.against, self.weights, self.routing) if part not in ("", "behaviour"))


NATIVE, REPLAYED = Variant("", "behaviour", "native"), Variant("", "behaviour", "R3")
CURRENT, CURRENT_HELD = Variant("", "current", "native"), Variant("", "current", "R2")

# of each variant: the samples by number in the step; without R3 where the routing was not traced
Passes = dict[Variant, dict[int, "Scored"]]


@dataclass(frozen=True, slots=True)
class Weights:
    """Directories of weights: those that sampled (by sample number), and later ones if any (own settings only)."""

    behaviour: Mapping[int, Path]
    current: Path | None = None


def score_all(configs: Mapping[str, Config], samples: Sequence[Dumped], weights: Weights) -> tuple[Passes, bool]:
    """Collective. Every variant of every sample, on every rank, and whether this is rank 0.

    configs: by the settings that differ, "" first; all run one after another on the same ranks.
    """
    from megasapo.mcore.scorer import Scorer
    from megasapo.mcore.topology import Topology

    passes: Passes = {}
    topo = None
    try:
        for against, cfg in configs.items():
            if topo is not None:
                topo.leave()
                gc.collect()  # modules refer to one another: two models may not fit on a device
            topo = Topology.init(cfg.parallel, seed=cfg.run.seed, rows=cfg.precision.rows)
            _score_variants(passes, Scorer(cfg, topo), against, samples, weights)
        assert topo is not None, "there is always the run's own configuration"
        return passes, topo.rank == 0
    finally:
        if topo is not None:
            topo.destroy()


def _score_variants(passes: Passes, scorer: Scorer, against: str, samples: Sequence[Dumped], weights: Weights) -> None:
    for directory in sorted({weights.behaviour[s.number] for s in samples}):
        scorer.load(directory)
        same = [s for s in samples if weights.behaviour[s.number] == directory]
        for routing in ROUTINGS:
            _score(passes, scorer, Variant(against, "behaviour", routing), same)
    if weights.current is not None and not against:
        scorer.load(weights.current)
        for routing in ROUTINGS:
            _score(passes, scorer, Variant(against, "current", routing), samples)


def _score(passes: Passes, scorer: Scorer, variant: Variant, samples: Sequence[Dumped]) -> None:
    has_experts = bool(scorer.layers)
    forced: list[np.ndarray | None] | None = None
    if variant.routing == "R2":
        samples = samples if has_experts else []
        forced = [passes[NATIVE][s.number].choices for s in samples]
    elif variant.routing == "R3":
        samples = [s for s in samples if s.routing is not None]
        forced = [s.routing for s in samples]
    if samples:
        scored = scorer.score([s.tokens for s in samples], forced, with_routing=has_experts)
        passes.setdefault(variant, {}).update({s.number: one for s, one in zip(samples, scored, strict=True)})
