"""Diagnosis of a run while it trains: every so many steps a sample of the batch is scored again, and the variance of
its log-ratio is taken apart. Also hands expert choices to the trace.

Called by train.py. It keeps the weights that sampled what is still to be diagnosed; what the figures mean is
routing/decompose.py's.
"""

from __future__ import annotations

import logging
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
    from megasapo.routing.decompose import Decomposition
    from megasapo.routing.scored import ScoredSequence


log = logging.getLogger(__name__)


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
        if version is None:
            return Figures({"routing/diagnosis_skipped": 1.0})
        scored = self._score([s for s in sequences if s.uid in origins], self._weights[version])
        _check_offset(scored)
        whole = self._decompose(scored)
        return self._publish(step, version, whole, scored, origins)

    def _origins(self, groups: Sequence[Group]) -> list[Origin]:
        """Collective. Of every sample of the batch."""
        mine = [
            Origin(group.uid * len(group.samples) + i, s.completion.version_min, s.completion.version_max, s.reward)
            for group in groups
            for i, s in enumerate(group.samples)
        ]
        return sorted(origin for part in self._topo.gather(mine) for origin in part)

    def _choose(self, origins: list[Origin], step: int) -> tuple[int | None, dict[int, Origin]]:
        """The version that most samples were drawn with from the first token to the last, and some of these samples.

        A decomposition speaks of one set of behaviour weights. None where generation outlived every update.
        """
        whole = [o for o in origins if o.version_min == o.version_max and o.version_min in self._weights]
        if not whole:
            if self._topo.rank == 0:
                log.warning(
                    "step %d is not diagnosed: no response was sampled with one weight version of %s from beginning to "
                    "end; lower rollout.max_staleness",
                    step,
                    sorted(self._weights),
                )
            return None, {}
        version = Counter(o.version_min for o in whole).most_common(1)[0][0]
        candidates = [o for o in whole if o.version_min == version]
        size = min(self._cfg.routing.diagnose_sequences, len(candidates))
        chosen = np.random.default_rng([self._cfg.run.seed, step]).choice(len(candidates), size, replace=False)
        return version, {candidates[i].uid: candidates[i] for i in chosen}

    def _score(self, sequences: Sequence[TrainSequence], theta_0: Weights) -> list[ScoredSequence]:
        from megasapo.mcore.diagnose import score_routings, sweep_groups
        from megasapo.mcore.exchange import build_batch

        layout = self._policy.routing_layout
        assert layout is not None
        batch = build_batch(
            sequences,
            self._topo,
            mini_batches=1,
            group_size=1,
            packing=self._packing,
            weight_rule=_no_weights,
            routing=layout,
        )
        groups = sweep_groups(len(layout.layers), self._cfg.routing.diagnose_sweep)
        return score_routings(self._policy, batch.mini[0], theta_0, self._topo, groups)


def _no_weights(loss_tokens: np.ndarray, *, num_sequences: int, num_loss_tokens: int) -> np.ndarray:
    return np.zeros(len(loss_tokens), dtype=np.float32)


def _check_offset(scored: Sequence[ScoredSequence]) -> None:
    """Refuse routings that belong to the next or the previous token: right in shape, wrong in every row."""
    shifts = Counter(offset_of(s.routing_rollout, s.routing_behaviour) for s in scored)
    shift, count = shifts.most_common(1)[0] if shifts else (0, 0)
    if shift and count > len(scored) / 2:
        raise RoutingError(
            f"the server's routing is shifted by {shift} token against the learner's in {count} of {len(scored)} "
            "responses: its rows do not begin at the first token of the prompt"
        )
