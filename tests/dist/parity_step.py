"""One optimizer step in one layout, with everything it computed laid open: what every rank of the parity matrix runs.

`run` takes the step through the library's own batch making and Policy. What it records, it records from outside: the
policy's loss and optimizer are wrapped on the instance, gradients are read between backward and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megasapo import metrics
from megasapo.algo.settings import resolve
from megasapo.algo.weights import token_weights
from megasapo.config import Config
from megasapo.data.packing import join, pieces
from megasapo.mcore import bridge, routing_exchange
from megasapo.mcore.bridge.placement import place
from megasapo.mcore.diagnose import score_routings, sweep_groups
from megasapo.mcore.exchange import PackingRule, build_batch
from megasapo.mcore.policy import Policy, Weights
from megasapo.mcore.routing_exchange import RoutingLayout
from megasapo.mcore.topology import Topology
from megasapo.rollout.sequences import to_sequences
from megasapo.types import Batch, Group
from tests.dist import parity_layouts as given

Named = dict[str, torch.Tensor]
# (policy, topology, batch) -> the batch to step on; may break things first
Fault = Callable[[Policy, Topology, Batch], Batch]


def run(layout: given.Layout, case: given.Case, models: Path, topo: Topology, fault: Fault | None) -> dict[str, Any]:
    """Collective. On rank 0 what the step computed; see parity_compare for what becomes of it."""
    directory = models / layout.model
    cfg = given.configuration(layout, case, directory)
    policy = Policy(cfg, topo, resolve(cfg.algo, cfg.rollout), temperature=given.TEMPERATURE, total_steps=10)
    with _counting_routing() as received:
        batch = _make_batch(given.groups(layout.batch), cfg, topo, policy.routing_layout)
    _load(policy, directory / "old", topo)
    batch = policy.with_old_logprobs(batch, first=True)
    if case.routing_replay != "none":
        assert all(mb.routing is not None for mini in batch.mini for mb in mini.micro), "no routing was recorded"
    old_weights = policy.copy_weights()
    _load(policy, directory / "now", topo)
    scored = _diagnosed(policy, batch, old_weights, topo) if case.routing_replay == "R3" else None
    quantising = _diagnosed_as_if_quantising(policy, batch, old_weights, topo) if case.routing_replay == "R3" else None
    if fault is not None:
        batch = fault(policy, topo, batch)
    recorded = _Recorder(policy, topo)
    stats = metrics.merge(topo.gather(policy.update(batch)))
    micro = [mb for mini in batch.mini for mb in mini.micro] if topo.is_last_stage else []
    logp = {
        "old": _by_sequence([(mb, mb.old_logp) for mb in micro], topo),
        "reference": _by_sequence([(mb, mb.ref_logp) for mb in micro], topo),
        "now": _by_sequence(recorded.logp, topo),
    }
    weights, unlike = _exported(policy, topo)
    return {
        "loss": sum(topo.gather(recorded.loss)),
        "grad_norm": stats.pop("grad/norm").value(),
        "stats": metrics.scalars(stats),
        "logp": logp,
        "gradients": recorded.gradients,
        "weights": weights,
        "copies": recorded.unlike + unlike,
        "scored": scored,
        "scored_quantising": quantising,
        "routing_ids": topo.gather((sum(received), _ids_needed(batch, policy))),
    }


def _make_batch(groups: list[Group], cfg: Config, topo: Topology, routing: RoutingLayout | None) -> Batch:
    """As train.py makes one; replica r's leader fetched every dp-th group."""
    algo = resolve(cfg.algo, cfg.rollout)
    sequences = to_sequences(groups[topo.dp_rank :: topo.dp], algo) if topo.is_leader else []
    if cfg.algo.routing_replay == "R3":
        assert routing is not None
        sequences = [replace(s, routing=given.rollout_routing(s, len(routing.layers))) for s in sequences]
    else:
        routing = None
    return build_batch(
        sequences,
        topo,
        mini_batches=1,
        group_size=given.GROUP_SIZE,
        packing=PackingRule.of(cfg),
        weight_rule=partial(token_weights, normalisation=algo.normalisation, constant_length=algo.constant_length),
        routing=routing,
    )


def _diagnosed_as_if_quantising(policy: Policy, batch: Batch, old_weights: Weights, topo: Topology) -> dict[str, Any]:
    """A diagnosis of a policy for which to leave out quantisation is to have its present weights again."""
    without = mock.Mock(side_effect=partial(policy.at, policy.copy_weights()))
    with mock.patch.object(policy, "quantises", True), mock.patch.object(policy, "unquantised", without):
        return _diagnosed(policy, batch, old_weights, topo)


def _diagnosed(policy: Policy, batch: Batch, old_weights: Weights, topo: Topology) -> dict[str, Any]:
    """The scores of the whole batch as a diagnosis takes them, and the forward passes that it took."""
    (mini,) = batch.mini
    assert policy.routing_layout is not None
    groups = sweep_groups(len(policy.routing_layout.layers), given.SWEEP_GROUPS)
    passes = mock.Mock(wraps=policy._logprobs)
    with mock.patch.object(policy, "_logprobs", passes):
        own = score_routings(policy, mini, old_weights, topo, groups)
    everyones = [one for part in topo.gather(own) for one in part]
    return {"passes": passes.call_count, "sequences": {s.uid: _tensors(asdict(s)) for s in everyones}}


def _tensors(values: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in values.items()}


@contextmanager
def _counting_routing() -> Iterator[list[int]]:
    """How many ids this rank receives inside, a number for each exchange."""
    received: list[int] = []
    exchange = routing_exchange.all_to_all

    def counting(*args: Any) -> Any:
        found = exchange(*args)
        received.append(sum(rows.size for part in found for rows in part.values()))
        return found

    with mock.patch.object(routing_exchange, "all_to_all", counting):
        yield received


def _ids_needed(batch: Batch, policy: Policy) -> int:
    """Those of this rank's tokens and layers, as far as they are known."""
    known = 0
    for mb in (mb for mini in batch.mini for mb in mini.micro if mb.routing is not None):
        for number, (uid, slots) in enumerate(zip(mb.uids, mb.slots, strict=True)):
            sent = given.known_rows(uid, slots + 1)
            known += int(((mb.sequence == number) & (mb.position < sent)).sum()) * mb.routing[0].numel()
    return known


class _Recorder:
    """Listens to a policy's update: its loss, its logprobs and its reduced gradients before they are clipped."""

    def __init__(self, policy: Policy, topo: Topology) -> None:
        self.loss = 0.0  # this rank's share
        self.logp: list[tuple[Any, torch.Tensor]] = []
        self.gradients: Named = {}
        self.unlike: list[str] = []
        compute_loss, step = policy._policy_loss, policy._optimizer.step

        def listening_loss(scores: Any, mb: Any) -> Any:
            value, stats = compute_loss(scores, mb)
            self.loss += float(value.detach())
            self.logp.append((mb, scores.logp.detach()))
            return value, stats

        def listening_step(allow: Any) -> Any:
            with _reduced_gradients_in_place_of_weights(policy):
                self.gradients, self.unlike = _exported(policy, topo)
            return step(allow)

        policy._policy_loss = listening_loss  # type: ignore[method-assign]
        policy._optimizer.step = listening_step  # type: ignore[method-assign]


def _load(policy: Policy, directory: Path, topo: Topology) -> None:
    bridge.load_hf(policy._chunks, directory)
    policy._optimizer._inner.reload_model_params()  # its main weights are copies, except in fp32


def _by_sequence(values: list[tuple[Any, torch.Tensor]], topo: Topology) -> dict[int, torch.Tensor]:
    """Values of all ranks' loss tokens by sequence, in order of position; 0 at the other tokens."""
    own: dict[int, Any] = {}
    for mb, value in values:
        own |= pieces(mb, torch.where(mb.loss_mask, value, 0.0))
    return {uid: torch.from_numpy(row) for uid, row in join(topo.gather(own)).items()}


@contextmanager
def _reduced_gradients_in_place_of_weights(policy: Policy) -> Iterator[None]:
    """Every parameter holds its reduced gradient inside; gradient buffers are as before afterwards.

    The distributed optimizer reduces each bucket by a reduce-scatter: a rank's own shard of it is valid, the rest is
    left over from backward.
    """
    buckets = [
        (bucket, buffer.data_parallel_group)
        for ddp in policy._ddp
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)
        for bucket in buffer.buckets
    ]
    unreduced = [bucket.grad_data.clone() for bucket, _ in buckets]
    for bucket, group in buckets:
        shards = list(bucket.grad_data.chunk(group.size()))
        own = shards[group.rank()].clone()
        dist.all_gather(shards, own, group=group)
    parameters = [p for chunk in policy._chunks for p in chunk.parameters()]
    weights = [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = p.main_grad
        yield
    finally:
        for p, value in zip(parameters, weights, strict=True):
            p.data = value
        for (bucket, _), value in zip(buckets, unreduced, strict=True):
            bucket.grad_data.copy_(value)


def _exported(policy: Policy, topo: Topology) -> tuple[Named, list[str]]:
    """Full tensors under HF names in model order (on every rank), and which copies of them are not equal to the bit.

    The export reads one of several copies (data-parallel replicas, norms and routers of tensor-parallel ranks, tied
    embeddings of two stages); each rank compares all that it holds with what came out.
    """
    full = {name: value.clone() for bucket in policy.export(1 << 22) for name, value in bucket}
    full = topo.first(full)
    unlike = []
    for placed in place(policy._chunks, policy.hf_config).placed:
        for piece in placed.pieces:
            held = placed.tensor.detach()[tuple(slice(*edge) for edge in piece.local)]
            name = placed.names[piece.source]
            expected = full[name][tuple(slice(*edge) for edge in piece.hf)]
            if not torch.equal(held, expected):
                unlike.append(f"{name} on rank {topo.rank} by {float((held - expected).abs().max()):.1e}")
    return full, [line for part in topo.gather(unlike) for line in part]
