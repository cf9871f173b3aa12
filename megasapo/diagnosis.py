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
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megasapo.config import Config
from megasapo.mcore.diagnose import score_routings, sweep_groups
from megasapo.mcore.exchange import PackingRule, build_batch
from megasapo.mcore.policy import Policy, Weights
from megasapo.mcore.topology import Topology
from megasapo.metrics import Hist, Metrics
from megasapo.routing.decompose import Decomposition, decompose
from megasapo.routing.pictures import flip_map
from megasapo.routing.scored import TERMS, TERMS_WITH_FP8, ScoredSequence
from megasapo.routing.store import cut_diagnosis, read_diagnosis, token_rows, write_diagnosis
from megasapo.routing.trace import TraceRow, TraceWriter
from megasapo.routing.validate import RoutingError, RoutingRule, offset_of
from megasapo.types import Group, TrainSequence

log = logging.getLogger(__name__)
MAX_SHOWN = 200  # diagnoses in the picture


@dataclass(frozen=True, slots=True)
class Figures:
    """What a step's diagnosis adds to its log: scalars on every rank, the rest on the first; nothing in other steps."""

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
    """Decomposes the log-ratios of every `routing.diagnose_every`-th batch, and feeds the trace."""

    def __init__(
        self,
        cfg: Config,
        topo: Topology,
        policy: Policy,
        packing: PackingRule,
        run_dir: Path,
        decode: Callable[[tuple[int, ...]], str],
        rule: RoutingRule | None,
        resume_step: int | None,
    ):
        """`decode`: token ids to text; `rule`: that servers' routing must fit, where they are asked for it."""
        self._cfg, self._topo, self._policy, self._packing = cfg, topo, policy, packing
        self._run_dir, self._decode, self._rule = run_dir, decode, rule
        layout = policy.routing_layout  # None: nothing is diagnosed
        self._groups = sweep_groups(len(layout.layers), cfg.routing.diagnose_sweep) if layout is not None else []
        self._begin(resume_step)
        self._weights: dict[int, Weights] = {}  # by version

    def keep(self, version: int) -> None:
        """Called once the weights of `version` are published: copies them if a diagnosis will want them."""
        every, staleness = self._cfg.routing.diagnose_every, self._cfg.rollout.max_staleness
        if not every:
            return
        due = -(-(version + 1) // every) * every  # the next step to be diagnosed; trains on what these weights sampled?
        self._weights = {v: w for v, w in self._weights.items() if v >= due - 1 - staleness}
        if version >= due - 1 - staleness:
            self._weights[version] = self._policy.copy_weights(torch.device("cpu"))

    def __call__(self, step: int, groups: Sequence[Group], sequences: Sequence[TrainSequence]) -> Figures:
        """Collective, after the update of `step` on this leader's `groups` and the `sequences` made of them."""
        if self._trace is not None:
            self._trace.add(step=step, sequences=_rollout_rows(groups, sequences))
        every = self._cfg.routing.diagnose_every
        if not every or step % every:
            return Figures()
        version, origins = self._choose(self._origins(groups), step)
        if version is None:
            return Figures({"routing/diagnosis_skipped": 1.0})
        scored = self._score([s for s in sequences if s.uid in origins], self._weights[version])
        _check_offset(scored)
        if self._trace is not None:
            self._trace.add(step=step, sequences=_learner_rows(scored, before=version, after=step))
        return self._write(step, version, scored, origins)

    def rolled_back(self, step: int) -> None:
        """The run went back to `step`: later versions of weights, and what they routed, are of no run."""
        self._weights.clear()
        self.close()
        self._topo.barrier()  # opening removes files of later steps: no rank may still be writing one
        self._begin(step)

    def _begin(self, last_step: int | None) -> None:
        """After `last_step` (None: at the beginning); what an earlier start left of later steps is removed."""
        if self._topo.rank == 0:
            cut_diagnosis(self._run_dir, last_step or 0)
        self._trace = _open_trace(self._cfg, self._topo, self._rule, self._run_dir, last_step)

    def close(self) -> None:
        if self._trace is not None:
            self._trace.close()

    def flush(self) -> None:
        """What was traced so far is on disk afterwards: called before a checkpoint."""
        if self._trace is not None:
            self._trace.flush()

    def take_metrics(self) -> Metrics:
        return self._trace.take_metrics() if self._trace is not None else {}

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
        layout = self._policy.routing_layout
        assert layout is not None
        batch = build_batch(
            sequences,
            self._topo,
            mini_batches=1,
            group_size=1,
            packing=self._packing,
            weight_rule=lambda loss_tokens, **_: np.zeros(len(loss_tokens), dtype=np.float32),  # nothing is learned
            routing=layout,
        )
        return score_routings(self._policy, batch.mini[0], theta_0, self._topo, self._groups)

    def _write(self, step: int, version: int, scored: Sequence[ScoredSequence], origins: dict[int, Origin]) -> Figures:
        """Collective. Merge the leaders' sums on rank 0, which writes them."""
        layout, algo = self._policy.routing_layout, self._cfg.algo
        assert layout is not None
        shown = sorted(origins)[: self._cfg.routing.diagnose_samples]
        part = decompose(
            scored,
            layers=layout.layers,
            num_experts=layout.num_experts,
            terms=TERMS_WITH_FP8 if self._policy.quantises else TERMS,
            sweep_groups=tuple(tuple(layout.layers[i] for i in group) for group in self._groups) or None,
            tau_pos=algo.tau_pos,
            tau_neg=algo.tau_neg,
        )
        rows = [
            token_rows(
                one,
                reward=origins[one.uid].reward,
                decode=self._decode,
                tau_pos=algo.tau_pos,
                tau_neg=algo.tau_neg,
            )
            for one in scored
            if one.uid in shown
        ]
        parts = self._topo.to_main((part, rows))
        if parts is None:
            return Figures(self._topo.first(None))
        whole = reduce(Decomposition.merge, (own for own, _ in parts))
        everyones = [row for _, own in parts for row in own]
        write_diagnosis(self._run_dir, step, whole, everyones, behaviour_version=version, current_version=step)
        images = {"routing/flips": flip_map(read_diagnosis(self._run_dir, newest=MAX_SHOWN))}
        return Figures(self._topo.first(whole.scalars()), whole.histograms(), images)


def _open_trace(
    cfg: Config, topo: Topology, rule: RoutingRule | None, run_dir: Path, resume_step: int | None
) -> TraceWriter | None:
    """The writer of this leader's share of RUN/routing/trace; None without one and on other ranks."""
    if rule is None or not cfg.routing.trace_rate or not topo.is_leader:
        return None
    return TraceWriter(
        run_dir / "routing" / "trace",
        rate=cfg.routing.trace_rate,
        budget_bytes=int(cfg.routing.trace_budget_mb * 2**20),
        layers=rule.moe_layers,
        num_experts=rule.num_experts,
        top_k=rule.top_k,
        part=(topo.dp_rank, topo.dp),
        seed=cfg.run.seed,
        resume_step=resume_step,
    )


def _rollout_rows(groups: Sequence[Group], sequences: Sequence[TrainSequence]) -> list[TraceRow]:
    completions = [(s.completion, len(group.prompt.input_ids)) for group in groups for s in group.samples]
    return [
        TraceRow(s.uid, "rollout", c.version_min, c.version_max, prompt, s.routing)
        for s, (c, prompt) in zip(sequences, completions, strict=True)
        if s.routing is not None
    ]


def _learner_rows(scored: Sequence[ScoredSequence], *, before: int, after: int) -> list[TraceRow]:
    rows = []
    for s in scored:
        prompt = int(s.loss_mask.argmax()) + 1  # slot t predicts token t + 1
        rows.append(TraceRow(s.uid, "learner", before, before, prompt, s.routing_behaviour))
        rows.append(TraceRow(s.uid, "learner", after, after, prompt, s.routing_current))
    return rows


def _check_offset(scored: Sequence[ScoredSequence]) -> None:
    """Refuse routings that belong to the next or the previous token: right in shape, wrong in every row."""
    shifts = Counter(offset_of(s.routing_rollout, s.routing_behaviour) for s in scored)
    shift, count = shifts.most_common(1)[0] if shifts else (0, 0)
    if shift and count > len(scored) / 2:
        raise RoutingError(
            f"the server's routing is shifted by {shift} token against the learner's in {count} of {len(scored)} "
            "responses: its rows do not begin at the first token of the prompt"
        )
