"""Mistakes that a learner could make, for the test that the parity matrix finds them. Each is a `parity_step.Fault`."""

from __future__ import annotations

from dataclasses import replace

import torch

from megasapo.mcore.policy import Policy
from megasapo.mcore.topology import Topology
from megasapo.types import Batch, MicroBatch


def weights_per_rank(policy: Policy, topo: Topology, batch: Batch) -> Batch:
    """A mean over the sequences of this rank in place of all ranks': the classic mistake."""
    (mini,) = batch.mini
    here = sum(len(mb.uids) for mb in mini.micro)
    scale = mini.num_sequences / here / topo.dp
    return Batch((replace(mini, micro=tuple(mb.with_(weight=mb.weight * scale) for mb in mini.micro)),))


def lost_gradient(policy: Policy, topo: Topology, batch: Batch) -> Batch:
    """One rank's gradient of one matrix never reaches the sum."""
    if topo.rank == 1:
        dict(policy._chunks[0].named_parameters())["decoder.layers.2.self_attention.linear_qkv.weight"].register_hook(
            torch.zeros_like
        )
    return batch


def wrong_positions(policy: Policy, topo: Topology, batch: Batch) -> Batch:
    """Positions that do not grow by one: what a rank that holds a part of a sequence could make up."""

    def squeezed(mb: MicroBatch) -> MicroBatch:
        return mb.with_(position_ids=mb.position_ids // 2)

    return Batch(tuple(replace(mini, micro=tuple(map(squeezed, mini.micro))) for mini in batch.mini))


def unequal_copies(policy: Policy, topo: Topology, batch: Batch) -> Batch:
    """A norm's weight drifts apart on the tensor-parallel ranks, which each hold a copy."""
    if topo.tp_rank == 1:
        with torch.no_grad():
            dict(policy._chunks[0].named_parameters())["decoder.layers.3.input_layernorm.weight"].mul_(1 + 1e-6)
    return batch


def sequence_mean_of_own_tokens(policy: Policy, topo: Topology, batch: Batch) -> Batch:
    """GSPO's ratio of a sequence is made of the tokens that this rank holds of it."""
    policy._sum_over_shards = lambda sums: sums  # type: ignore[method-assign]
    return batch
