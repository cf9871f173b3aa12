"""The forward passes behind a decomposition of the log-ratio, put together by sequence on each replica's leader.

Called by diagnosis.py after an update. What the numbers mean is routing/decompose.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megasapo.data.packing import Pieces, join, pieces
from megasapo.mcore.policy import Logprobs, Policy, Weights
from megasapo.mcore.topology import Topology
from megasapo.routing.scored import ScoredSequence
from megasapo.routing.validate import UNKNOWN
from megasapo.types import MicroBatch, MiniBatch

# of each micro-batch: rollout's, behaviour's and current routing [Tl, 3, L of this rank, K] int16
Routings = list[Tensor]


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
    routings = [torch.stack([z.short() for z in three], dim=1) for three in zip(rollout, chosen_0, chosen, strict=True)]
    parts = _to_leader(
        {
            "columns": columns,
            "scores": _by_sequence(micro, _scores(micro, passes, topo)) if topo.is_last_stage else {},
            "routing": _by_sequence(micro, routings),
        },
        topo,
    )
    if parts is None:
        return []
    return _scored_sequences(
        parts,
        num_groups=len(groups),
        num_layers=len(policy.routing_layout.layers),
        quantises=policy.quantises,
    )


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


def _by_sequence(micro: Sequence[MicroBatch], values: Sequence[Tensor]) -> Pieces:
    own: Pieces = {}
    for mb, value in zip(micro, values, strict=True):
        own |= pieces(mb, value)
    return own


def _to_leader(part: dict[str, Any], topo: Topology) -> list[dict[str, Any]] | None:
    """Collective over a replica. Everybody's parts on its leader."""
    parts: list[Any] | None = [None] * dist.get_world_size(topo.replica_group) if topo.is_leader else None
    leader = dist.get_global_rank(topo.replica_group, 0)
    dist.gather_object(part, parts, dst=leader, group=topo.replica_group)
    return parts


def _scored_sequences(
    parts: list[dict[str, Any]], *, num_groups: int, num_layers: int, quantises: bool
) -> list[ScoredSequence]:
    scores = join(part["scores"] for part in parts)
    by_columns: dict[tuple[int, ...], list[Pieces]] = {}
    for part in parts:
        if part["columns"]:  # stages without experts have nothing to say
            by_columns.setdefault(part["columns"], []).append(part["routing"])
    routing: dict[int, np.ndarray] = {}
    for columns, found in by_columns.items():
        for uid, own in join(found).items():
            whole = routing.setdefault(uid, np.empty((len(own), 3, num_layers, own.shape[-1]), dtype=np.int16))
            whole[:, :, list(columns)] = own
    return [_scored(uid, scores[uid], routing[uid], num_groups, quantises) for uid in sorted(scores)]


def _scored(uid: int, scores: np.ndarray, routing: np.ndarray, num_groups: int, quantises: bool) -> ScoredSequence:
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
        routing_rollout=routing[:, 0],
        routing_behaviour=routing[:, 1],
        routing_current=routing[:, 2],
        mismatch_sweep=mismatch if num_groups else None,
        drift_sweep=drift if num_groups else None,
        unquantised_replayed=passes[0] if quantises else None,
    )
