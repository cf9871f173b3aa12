"""Routing that rollout servers chose, from the leaders that fetched it to each rank's own tokens and layers.

Called by exchange.py once the batch is planned. Which slots and layers a rank holds follows from what all ranks know,
so a rank is sent the ids of its tokens and layers alone, in the small dtype in which a leader holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megasapo.data.packing import Layout, Shard
from megasapo.mcore.replay import RoutingReplay
from megasapo.mcore.topology import Topology, all_to_all
from megasapo.routing.cut import blank_routing, narrowed
from megasapo.types import TrainSequence


class Header(NamedTuple):
    """What every rank knows of a sequence."""

    uid: int
    tokens: int
    slots: int  # that it takes in a pack
    loss_tokens: int

    @staticmethod
    def of(row: TrainSequence, shard: Shard) -> Header:
        """`shard`: of any rank."""
        return Header(row.uid, len(row.tokens), shard.slots_for(len(row.tokens)), int(row.loss_mask.sum()))


@dataclass(frozen=True, slots=True)
class Keeps:
    """What one rank keeps of a replica's routing."""

    dp_rank: int
    shard: Shard  # which tokens
    columns: tuple[int, ...]  # which of the model's MoE layers


@dataclass(frozen=True, slots=True)
class RoutingLayout:
    """Which part of a routing belongs where; the same on all ranks."""

    ranks: tuple[Keeps, ...]  # by rank
    layers: tuple[int, ...]  # decoder layers, from 0, that have experts
    num_experts: int
    top_k: int

    @staticmethod
    def of(topo: Topology, replay: RoutingReplay) -> RoutingLayout:
        """Collective."""
        found = topo.gather((topo.dp_rank, topo.shard, replay.layers))
        layers = sorted({layer for _, _, own in found for layer in own})
        ranks = [Keeps(dp_rank, shard, tuple(map(layers.index, own))) for dp_rank, shard, own in found]
        return RoutingLayout(tuple(ranks), tuple(layers), replay.num_experts, replay.top_k)


# of a micro-batch, its sequences in order
Planned = Sequence[Header]
# by uid, the routing [tokens, L, K] of the tokens of a rank that it is known of: a sequence's first ones, in order
Rows = dict[int, np.ndarray]


def exchange_routing(
    mine: Sequence[TrainSequence], planned: Sequence[Sequence[Planned]], topo: Topology, layout: RoutingLayout
) -> list[torch.Tensor]:
    """Collective. The routing [Tl, L of this rank, K] of each of this rank's micro-batches, on the CPU.

    `planned`: [replica][micro-batch], the same on all ranks. Tokens without a known routing are UNKNOWN, slots
    of padding get experts in turn. int16 where something is UNKNOWN, else `storage_dtype`.
    """
    routing = {row.uid: row.routing for row in mine if row.routing is not None}
    outgoing: list[Rows] = [{} for _ in layout.ranks]
    for rows, keeps in zip(outgoing, layout.ranks, strict=True):
        for micro in planned[keeps.dp_rank]:
            rows |= _known_rows(micro, keeps, routing)
    known = {uid: rows for part in all_to_all(outgoing, topo.world_group_cpu) for uid, rows in part.items()}
    keeps = layout.ranks[topo.rank]
    own = [_put_together(micro, keeps, layout, known) for micro in planned[topo.dp_rank]]
    return [torch.from_numpy(narrowed(one, layout.num_experts)) for one in own]


def _known_rows(micro: Planned, keeps: Keeps, routing: Mapping[int, np.ndarray]) -> Rows:
    """What `routing`, of whole sequences, says of the tokens that a rank holds of a micro-batch."""
    if not any(h.uid in routing for h in micro):
        return {}
    sequence, position = _slots(micro, keeps.shard)
    found: Rows = {}
    for number, h in enumerate(micro):
        if h.uid in routing:
            rows = routing[h.uid]
            here = position[sequence == number]
            found[h.uid] = rows[here[here < len(rows)]][:, list(keeps.columns)]
    return found


def _put_together(micro: Planned, keeps: Keeps, layout: RoutingLayout, known: Rows) -> np.ndarray:
    """[Tl, L, K] int16: this rank's routing of one micro-batch."""
    sequence, position = _slots(micro, keeps.shard)
    predictions, num_layers = [h.tokens - 1 for h in micro], len(keeps.columns)
    whole = blank_routing(predictions, sequence, position, num_layers, layout.num_experts, layout.top_k)
    for number, h in enumerate(micro):
        if h.uid in known:
            (here,) = np.nonzero(sequence == number)
            whole[here[: len(known[h.uid])]] = known[h.uid]
    return whole


def _slots(micro: Planned, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and position [Tl] of the slots that a rank holds of a micro-batch; positions rise in each sequence."""
    pack = Layout.of([h.slots for h in micro], shard)
    return pack.sequence[pack.own], pack.position[pack.own]
