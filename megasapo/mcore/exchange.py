"""From the sequences that each data-parallel leader holds to the packed batch that each rank learns from.

Called by train.py and sft.py. Only lengths and identities are global; tokens move once, from the leader that fetched a
sequence to the one that trains on it, and from there to the ranks of its replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from megasapo.config import Config
from megasapo.data.balance import attention_costs, plan, split_mini_batches
from megasapo.data.packing import pack
from megasapo.geometry import read_geometry
from megasapo.mcore.routing_exchange import Header, RoutingLayout, exchange_routing
from megasapo.mcore.topology import Topology, all_to_all
from megasapo.types import Batch, MicroBatch, MiniBatch, TrainSequence


class WeightRule(Protocol):
    """algo.weights.token_weights with the settings of the run filled in."""

    def __call__(self, loss_tokens: np.ndarray, *, num_sequences: int, num_loss_tokens: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class PackingRule:
    """How sequences are put together into micro-batches."""

    max_tokens: int  # slots of a micro-batch at most, before context parallelism cuts it
    attention_ratio: float = 0.0  # Geometry.cost_ratio, by which replicas get equal work; 0: equal tokens
    one_each: bool = False  # one sequence a micro-batch

    @staticmethod
    def of(cfg: Config) -> PackingRule:
        ratio = read_geometry(cfg.model.path).cost_ratio
        return PackingRule(cfg.train.micro_batch_tokens, ratio, one_each=not cfg.train.packing)


# [replica][micro-batch] -> sequences
Assignment = list[list[list[Header]]]


def build_batch(
    mine: Sequence[TrainSequence],
    topo: Topology,
    *,
    mini_batches: int,
    group_size: int,
    packing: PackingRule,
    weight_rule: WeightRule,
    routing: RoutingLayout | None = None,
) -> Batch:
    """Collective. Split all ranks' sequences into mini-batches, balance them over replicas, pack this rank's.

    `mine`: what this rank's leader fetched (empty on other ranks). A mini-batch is a run of groups in uid order, so its
    content does not depend on the layout. With `routing` micro-batches get the sequences' own (R3). Raises ValueError
    for a sequence longer than a micro-batch.
    """
    headers = _share_headers(mine, topo)
    groups = sorted({h.uid // group_size for h in headers})
    assignments, counts = [], []
    for part in split_mini_batches(len(groups), mini_batches):
        chosen = {groups[i] for i in part}
        rows = [h for h in headers if h.uid // group_size in chosen]
        assignments.append([[[rows[i] for i in micro] for micro in rank] for rank in split(rows, topo, packing)])
        counts.append((len(rows), sum(h.loss_tokens for h in rows)))
    held = _move(mine, assignments, topo)
    mini = []
    for assignment, (num_sequences, num_loss_tokens) in zip(assignments, counts, strict=True):
        micro = [
            _pack([held[h.uid] for h in sequences], topo, weight_rule, num_sequences, num_loss_tokens)
            for sequences in assignment[topo.dp_rank]
        ]
        if routing is not None:
            found = exchange_routing(mine, assignment, topo, routing)
            micro = [mb.with_(routing=z.to(topo.device)) for mb, z in zip(micro, found, strict=True)]
        mini.append(MiniBatch(tuple(micro), num_sequences, num_loss_tokens))
    return Batch(tuple(mini))


def split(rows: Sequence[Header], topo: Topology, packing: PackingRule) -> list[list[list[int]]]:
    """[replica][micro-batch] -> indices into rows; ValueError for a row longer than a micro-batch."""
    lengths = [h.slots for h in rows]
    planned = partial(
        plan,
        lengths,
        topo.dp,
        packing.max_tokens,
        uids=[h.uid for h in rows],
        costs=attention_costs(lengths, packing.attention_ratio),
        one_each=packing.one_each,
    )
    found = planned(multiple_of=topo.micro_batch_multiple)
    if topo.vpp > 1 and len(found[0]) < 2 * topo.pp:
        # With a single round megatron-core's interleaved stages wait for one another forever (0.16.1 to 0.19.2): a
        # stage waits for the size of what comes next while its neighbour waits for what it was to send.
        found = planned(multiple_of=2 * topo.pp)
    return found


def _pack(
    rows: list[TrainSequence], topo: Topology, rule: WeightRule, num_sequences: int, num_loss_tokens: int
) -> MicroBatch:
    loss_tokens = np.array([row.loss_mask.sum() for row in rows], dtype=np.int64)
    weights = rule(loss_tokens, num_sequences=num_sequences, num_loss_tokens=num_loss_tokens)
    return pack(rows, weights, shard=topo.shard).to(topo.device)


def _share_headers(mine: Sequence[TrainSequence], topo: Topology) -> list[Header]:
    local = [Header.of(row, topo.shard) for row in mine]
    headers: list[Header] = sorted(h for one in topo.gather(local) for h in one)
    uids = [h.uid for h in headers]
    assert len(set(uids)) == len(uids), "two leaders hold the same sequence"
    return headers


def _move(mine: Sequence[TrainSequence], assignments: list[Assignment], topo: Topology) -> dict[int, TrainSequence]:
    """Collective. The sequences that this rank trains on, by uid; routing stays behind (routing_exchange.py)."""
    held: list[Any] = [None]
    if topo.leaders_group is not None:
        owner = {
            h.uid: rank for each in assignments for rank, micros in enumerate(each) for micro in micros for h in micro
        }
        outgoing: list[list[TrainSequence]] = [[] for _ in range(topo.dp)]
        for row in mine:
            outgoing[owner[row.uid]].append(replace(row, routing=None))
        held = [[row for rows in all_to_all(outgoing, topo.leaders_group) for row in rows]]
    leader = dist.get_global_rank(topo.replica_group, 0)
    dist.broadcast_object_list(held, leader, group=topo.replica_group)
    return {row.uid: row for row in held[0]}
