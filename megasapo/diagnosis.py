"""Diagnosis of a run while it trains: every so many steps a sample of the batch is scored again, and the variance of
its log-ratio is taken apart. Also hands expert choices to the trace.

Called by train.py. It keeps the weights that sampled what is still to be diagnosed; what the figures mean is
routing/decompose.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megasapo.config import Config
from megasapo.metrics import Hist
from megasapo.routing.validate import RoutingError, offset_of
from megasapo.types import Group, TrainSequence

if TYPE_CHECKING:
    from megasapo.mcore.exchange import PackingRule
    from megasapo.mcore.policy import Policy, Weights
    from megasapo.mcore.topology import Topology
    from megasapo.routing.decompose import Decomposition, ScoredSequence


@dataclass(frozen=True, slots=True)
class Figures:
    """What a step's diagnosis adds to its log; all empty on other ranks than the first and in other steps."""

    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Hist] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)


class Origin(NamedTuple):
    """Where a sample comes from."""

    uid: int
    version_min: int
    version_max: int
    reward: float


class Diagnosis:
    """Decomposes the log-ratios of every `routing.diagnose_every`-th batch."""

    def __init__(
        self,
        cfg: Config,
        topo: Topology,
        policy: Policy,
        packing: PackingRule,
        run_dir: Path,
        decode: Callable[[tuple[int, ...]], str],
    ):
        self._cfg, self._topo, self._policy, self._packing = cfg, topo, policy, packing
        self._run_dir, self._decode = run_dir, decode
        self._weights: dict[int, Weights] = {}  # by version

    def keep(self, version: int) -> None:
        """Called when the weights of `version` have been published: copies them if a diagnosis will want them."""
        every, staleness = self._cfg.routing.diagnose_every, self._cfg.rollout.max_staleness
        if not every:
            return
        due = -(-(version + 1) // every) * every  # the next diagnosed step that they may have sampled for
        self._weights = {v: w for v, w in self._weights.items() if due - 1 - staleness <= v}
        if due - 1 - staleness <= version:
            self._weights[version] = self._policy.copy_weights(torch.device("cpu"))

    def __call__(self, step: int, groups: Sequence[Group], sequences: Sequence[TrainSequence]) -> Figures:
        """Collective, after the update of `step` on this leader's `groups` and the `sequences` made of them."""
        every = self._cfg.routing.diagnose_every
        if not every or step % every:
            return Figures()
        version, origins = self._choose(self._origins(groups), step)
        batch = self._batch([s for s in sequences if s.uid in origins])
        scored = self._score(batch, version)
        return self._write(step, version, scored, origins)

    def _origins(self, groups: Sequence[Group]) -> list[Origin]:
        """Collective. Of every sample of the batch."""
        mine = [
            Origin(group.uid * len(group.samples) + i, s.completion.version_min, s.completion.version_max, s.reward)
            for group in groups
            for i, s in enumerate(group.samples)
        ]
        return sorted(origin for part in self._topo.gather(mine) for origin in part)

    def _choose(self, origins: list[Origin], step: int) -> tuple[int, dict[int, Origin]]:
        """The version that most samples have been drawn with from the first token to the last, and some of them.

        The decomposition speaks of one set of behaviour weights; others would need their own passes.
        """
        whole = [o for o in origins if o.version_min == o.version_max and o.version_min in self._weights]
        if not whole:
            versions = sorted({(o.version_min, o.version_max) for o in origins})
            raise UserError(
                f"step {step} cannot be diagnosed: its samples have weight versions {versions}, and kept are those of "
                f"{sorted(self._weights)}; lower rollout.max_staleness, or set routing.diagnose_every=0"
            )
        version = Counter(o.version_min for o in whole).most_common(1)[0][0]
        candidates = [o for o in whole if o.version_min == version]
        size = min(self._cfg.routing.diagnose_sequences, len(candidates))
        chosen = np.random.default_rng([self._cfg.run.seed, step]).choice(len(candidates), size, replace=False)
        return version, {candidates[i].uid: candidates[i] for i in chosen}
