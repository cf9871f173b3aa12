"""Routing that rollout servers chose, from the leaders that fetched it to each rank's own tokens and layers.

Called by exchange.py once the batch is planned. Which slots and layers a rank holds follows from what all ranks know,
so the ids travel bare, once, in the smallest dtype, and a rank receives only those of its tokens and layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from megasapo.data.packing import Layout, Shard
from megasapo.mcore.replay import RoutingReplay
from megasapo.mcore.topology import Topology
from megasapo.routing.cut import blank_routing, narrowed
from megasapo.routing.validate import storage_dtype
from megasapo.types import TrainSequence


class Header(NamedTuple):
    """What every rank knows of a sequence."""

    uid: int
    tokens: int
    slots: int  # that it takes in a pack
    loss_tokens: int
    leader: int  # data-parallel rank that fetched it
    routed: int = 0  # tokens whose routing the leader has, from the first on
    gaps: bool = False  # some of these are UNKNOWN


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


def exchange_routing(
    mine: Sequence[TrainSequence], planned: Sequence[Sequence[Planned]], topo: Topology, layout: RoutingLayout
) -> list[torch.Tensor]:
    """Collective. The routing [Tl, L of this rank, K] of each of this rank's micro-batches, on the CPU.

    `planned`: [replica][micro-batch], the same on all ranks. Tokens without a known routing are UNKNOWN, slots
    of padding get experts in turn. int16 where something is UNKNOWN, else `storage_dtype`.
    """
    gaps = any(h.gaps for micros in planned for micro in micros for h in micro)
    dtype = np.dtype(np.int16) if gaps else storage_dtype(layout.num_experts)
    outgoing = [torch.empty(0, dtype=torch.uint8) for _ in layout.ranks]
    if topo.is_leader:
        routing = {row.uid: row.routing for row in mine if row.routing is not None}
        for rank, keeps in enumerate(layout.ranks):
            parts = [_known_rows(micro, keeps, topo.dp_rank, routing) for micro in planned[keeps.dp_rank]]
            data = b"".join(part.astype(dtype).tobytes() for part in parts)
            outgoing[rank] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else outgoing[rank]
    keeps = layout.ranks[topo.rank]
    own = [_Own(micro, keeps, layout) for micro in planned[topo.dp_rank]]
    leaders = _leaders(topo, layout)
    expected = [
        sum(o.ids_from(leaders[rank]) for o in own) * dtype.itemsize if rank in leaders else 0
        for rank in range(topo.world_size)
    ]
    received = torch.empty(sum(expected), dtype=torch.uint8)
    dist.all_to_all_single(
        received, torch.cat(outgoing), expected, [o.numel() for o in outgoing], group=topo.world_group_cpu
    )
    for rank, data in enumerate(received.split(expected)):
        if expected[rank]:
            ids = iter(np.split(data.numpy().view(dtype), np.cumsum([o.ids_from(leaders[rank]) for o in own])[:-1]))
            for o in own:
                o.put(leaders[rank], next(ids))
    return [torch.from_numpy(narrowed(o.routing, layout.num_experts)) for o in own]


def _leaders(topo: Topology, layout: RoutingLayout) -> dict[int, int]:
    """Rank -> data-parallel rank of the leaders: the first rank of each replica."""
    leaders: dict[int, int] = {}
    for rank, keeps in enumerate(layout.ranks):
        if keeps.dp_rank not in leaders.values():
            leaders[rank] = keeps.dp_rank
    return leaders


def _known_rows(micro: Planned, keeps: Keeps, leader: int, routing: Mapping[int, np.ndarray]) -> np.ndarray:
    """[tokens, L, K] the rows of a micro-batch that `leader` has for a rank, in the order of its slots."""
    rows = {number: routing[h.uid] for number, h in enumerate(micro) if h.leader == leader and h.routed}
    if not rows:
        return np.empty(0, dtype=np.int16)
    slots = _Slots(micro, keeps.shard)
    here = np.flatnonzero(slots.known(micro, leader))
    sequences, positions = slots.sequence[here], slots.position[here]
    # slots of one sequence lie together, and sequences in order
    return np.concatenate([row[positions[sequences == n]][:, list(keeps.columns)] for n, row in rows.items()])


class _Slots:
    """Sequence and position [Tl] of the slots that a rank holds of a micro-batch."""

    def __init__(self, micro: Planned, shard: Shard) -> None:
        pack = Layout.of([h.slots for h in micro], shard)
        self.sequence, self.position = pack.sequence[pack.own], pack.position[pack.own]

    def known(self, micro: Planned, leader: int) -> np.ndarray:
        """[Tl] bool: the slots whose routing `leader` has."""
        routed = [h.routed if h.leader == leader else 0 for h in micro]
        return self.position < np.array([*routed, 0])[self.sequence]


class _Own:
    """This rank's routing of one micro-batch, while it is put together."""

    def __init__(self, micro: Planned, keeps: Keeps, layout: RoutingLayout) -> None:
        self._micro = micro
        self._slots = _Slots(micro, keeps.shard)
        predictions, num_layers = [h.tokens - 1 for h in micro], len(keeps.columns)
        self.routing = blank_routing(
            predictions, self._slots.sequence, self._slots.position, num_layers, layout.num_experts, layout.top_k
        )

    def ids_from(self, leader: int) -> int:
        """How many ids `leader` sends."""
        return int(self._slots.known(self._micro, leader).sum()) * self.routing[0].size

    def put(self, leader: int, ids: np.ndarray) -> None:
        self.routing[self._slots.known(self._micro, leader)] = ids.reshape(-1, *self.routing.shape[1:])
