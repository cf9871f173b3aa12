"""The forward passes behind a decomposition of the log-ratio, put together by sequence on each replica's leader.

Called by diagnosis.py after an update. What the numbers mean is routing/decompose.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megasapo.data.packing import Pieces, all_pieces, join, join_layers
from megasapo.mcore.policy import Logprobs, Policy, Weights
from megasapo.mcore.topology import Topology
from megasapo.routing.scored import ScoredSequence
from megasapo.routing.validate import UNKNOWN
from megasapo.types import MicroBatch, MiniBatch


def sweep_groups(num_layers: int, groups: int) -> list[list[int]]:
    """Columns of the MoE layers in at most so many consecutive groups of nearly equal size; none for 0."""
    return [part.tolist() for part in np.array_split(np.arange(num_layers), min(groups, num_layers))] if groups else []


def score_routings(
    policy: Policy, mini: MiniBatch, theta_0: Weights, topo: Topology, groups: Sequence[Sequence[int]]
) -> list[ScoredSequence]:
    """Collective. The mini-batch's sequences under the logprobs of ScoredSequence, on leaders; none elsewhere.

    `mini` brings the rollout's routing; `theta_0` are the weights that it was sampled with, the policy's own are theta.
    Costs four forward passes, a fifth with nothing quantised where the policy quantises, and for each group of layers
    but the first two more.
    """
    assert policy.routing_layout is not None, "a Policy without routing replay cannot be diagnosed"
    columns = policy.routing_layout.ranks[topo.rank].columns
    micro = mini.micro
    cuts = [group[0] for group in groups[1:]]
    rollout = [_known(mb.routing) for mb in micro]
    with policy.at(theta_0):
        behaviour, chosen_0 = policy.natural_logprobs(micro)
        held = policy.routed_logprobs(micro, rollout)
        unquantised = []
        if policy.quantises:
            with policy.unquantised():
                unquantised = [policy.routed_logprobs(micro, rollout)]
        mismatch = [policy.routed_logprobs(micro, _held_below(rollout, columns, cut)) for cut in cuts]
    still = policy.routed_logprobs(micro, chosen_0)
    current, chosen = policy.natural_logprobs(micro)
    drift = [policy.routed_logprobs(micro, _held_below(chosen_0, columns, cut)) for cut in cuts]
    passes = [*unquantised, behaviour, *mismatch, held, current, *drift, still]
    routings = [torch.stack([z.short() for z in three], dim=2) for three in zip(rollout, chosen_0, chosen, strict=True)]
    own_scores = all_pieces(micro, _scores(micro, passes, topo)) if topo.is_last_stage else {}
    parts = topo.to_leader((own_scores, (columns, all_pieces(micro, routings))))
    num_layers = len(policy.routing_layout.layers)
    return _scored_sequences(parts or [], num_layers, len(groups), quantises=policy.quantises)


def _known(routing: Tensor | None) -> Tensor:
    assert routing is not None, "a batch to be diagnosed brings the rollout's routing"
    return routing


def _held_below(routing: Sequence[Tensor], columns: Sequence[int], cut: int) -> list[Tensor]:
    """Routings whose layers from column `cut` of the model on are free."""
    own = torch.tensor([column >= cut for column in columns], dtype=torch.bool)
    return [z.short().masked_fill(own.to(z.device)[None, :, None], UNKNOWN) for z in routing]


def _scores(micro: Sequence[MicroBatch], passes: Sequence[Logprobs], topo: Topology) -> list[Tensor]:
    """Of each micro-batch [Tl, 4 + passes] float32: target, loss mask, advantage, rollout logprob, logprobs."""
    found = []
    for i, mb in enumerate(micro):
        targets = mb.targets.reshape(topo.tp, -1)[topo.tp_rank]
        # float64 holds every token id
        known = [targets, mb.loss_mask, mb.advantage, mb.rollout_logp, *(one[i] for one in passes)]
        found.append(torch.stack([column.double() for column in known if column is not None], dim=1))
    return found


def _scored_sequences(
    parts: Sequence[tuple[Pieces, tuple[tuple[int, ...], Pieces]]], num_layers: int, num_groups: int, *, quantises: bool
) -> list[ScoredSequence]:
    """From every rank's scores, and its columns and routings."""
    scores = join(own for own, _ in parts)
    routing = join_layers((own for _, own in parts), num_layers)
    return [_scored(uid, scores[uid], routing[uid], num_groups, quantises) for uid in sorted(scores)]


def _scored(uid: int, scores: np.ndarray, routing: np.ndarray, num_groups: int, quantises: bool) -> ScoredSequence:
    """`scores` as `_scores` has them; `routing` [n - 1, L, 3, K]: the rollout's, the behaviour's and the current."""
    targets, mask, advantage, rollout = scores[:, :4].T
    passes = scores[:, 4:].T.astype(np.float32)
    mismatch, drift = np.split(passes[int(quantises) :], 2)  # [2 + cuts, n - 1] each
    return ScoredSequence(
        uid=uid,
        tokens=targets.astype(np.int32),
        loss_mask=mask.astype(bool),
        advantage=float(advantage[mask > 0][0]) if mask.any() else 0.0,
        rollout_logp=rollout.astype(np.float32),
        behaviour_replayed=mismatch[-1],
        behaviour=mismatch[0],
        current_replayed=drift[-1],
        current=drift[0],
        routing_rollout=routing[:, :, 0],
        routing_behaviour=routing[:, :, 1],
        routing_current=routing[:, :, 2],
        mismatch_sweep=mismatch if num_groups else None,
        drift_sweep=drift if num_groups else None,
        unquantised_replayed=passes[0] if quantises else None,
    )
