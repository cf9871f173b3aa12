"""Routing replay leaves nothing behind where it should not, and refuses what it cannot replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megasapo.config import ConfigError
from megasapo.mcore.replay import RoutingReplay
from tests.unit.routers import TOKENS, TOP_K, Chunk, batch, gradients, inputs, random_routing


def test_without_gradients_nothing_waits_for_a_backward() -> None:
    chunk = Chunk([1])
    replay = RoutingReplay([chunk])
    with torch.no_grad():
        for _ in range(3):
            with replay.replay(chunk, batch(random_routing(1))):
                chunk(inputs(0))
    natural = chunk(inputs(0), 1)  # and afterwards the router chooses again, in backward too
    natural.sum().backward()
    assert gradients(chunk)


def test_models_do_not_share_routings() -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    before = len(RouterReplay.global_router_replay_instances)
    one, other = Chunk([1]), Chunk([1])
    of_one, of_other = RoutingReplay([one]), RoutingReplay([other])
    with torch.no_grad(), of_one.record(one, batch()):
        other(inputs(0))
        one(inputs(1))
    assert of_other.take() == []
    (routing,) = of_one.take()
    assert routing[:, 0].tolist() == (inputs(1) @ one.routers[0].weight.t()).topk(TOP_K).indices.tolist()
    assert len(RouterReplay.global_router_replay_instances) == before
    with pytest.raises(ValueError, match="not of the model"), of_one.record(other, batch()):
        pass
    with pytest.raises(ValueError, match="layer 0 already has a routing replay"):
        RoutingReplay([one])


def test_a_stage_without_experts_has_empty_routings() -> None:
    dense, sparse = Chunk([]), Chunk([3])
    replay = RoutingReplay([dense, sparse])
    for chunk in (dense, sparse):
        with torch.no_grad(), replay.record(chunk, batch()):
            chunk(inputs(0))
    (routing,) = replay.take()
    assert routing.shape == (TOKENS, 1, TOP_K)
    alone = RoutingReplay([Chunk([])])
    (chunk,) = alone._layers
    with torch.no_grad(), alone.record(chunk, batch()):
        pass
    (empty,) = alone.take()
    assert empty.shape == (TOKENS, 0, TOP_K)
    with torch.no_grad(), alone.replay(chunk, batch(empty)):
        pass


def test_a_failed_forward_leaves_native_routing_behind() -> None:
    chunk = Chunk([1])
    replay = RoutingReplay([chunk])
    with pytest.raises(ZeroDivisionError), replay.step(), replay.replay(chunk, batch(random_routing(1))):
        _broken(chunk(inputs(0), 1))
    with torch.no_grad(), replay.record(chunk, batch()):
        out = chunk(inputs(0))
    assert torch.equal(out, chunk(inputs(0)))
    assert len(replay.take()) == 1


def _broken(_: Tensor) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: None, "no routing to replay"),
        (lambda r: r[1:], r"shape \[19, 2, 3\].*20 tokens of the micro-batch, 2 MoE layers and top-k 3"),
        (lambda r: r[:, :1], r"shape \[20, 1, 3\]"),
        (lambda r: r[..., :2], r"shape \[20, 2, 2\]"),
        (lambda r: r.long(), r"torch.int64.*as uint8 or int16"),
    ],
)
def test_routings_of_another_shape_are_refused(change: Any, message: str) -> None:
    chunk = Chunk([3, 5])
    with pytest.raises(ValueError, match=message), torch.no_grad():
        with RoutingReplay([chunk]).replay(chunk, batch(change(random_routing(2)))):
            chunk(inputs(0))


def test_misuse_is_refused() -> None:
    chunk = Chunk([1])
    replay = RoutingReplay([chunk])
    routing = random_routing(1)
    with pytest.raises(RuntimeError, match=r"belongs inside step\(\)"), replay.replay(chunk, batch(routing)):
        pass
    with pytest.raises(RuntimeError, match=r"must run inside replay\(\)"), replay.step():
        chunk(inputs(0))
    with pytest.raises(RuntimeError, match="was not routed again for 1 micro-batches"), replay.step():
        with replay.replay(chunk, batch(routing)):
            chunk(inputs(0), 1)
    with pytest.raises(RuntimeError, match="layer 0 took its experts from replay 0 times"), replay.step():
        with replay.replay(chunk, batch(routing)):
            pass
    with pytest.raises(ValueError, match=r"chose \[20, 3\] experts, but this rank has 19 tokens"), torch.no_grad():
        with replay.record(chunk, batch(tokens=19)):
            chunk(inputs(0))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_moe_experts", None, "this one has none"),
        ("moe_router_fusion", True, "moe_router_fusion=True"),
        ("moe_enable_routing_replay", True, "moe_enable_routing_replay=True"),
        ("overlap_moe_expert_parallel_comm", True, "run at once"),
        ("mtp_num_layers", 1, "mtp_num_layers=1"),
    ],
)
def test_models_whose_routing_cannot_be_replayed_are_refused(field: str, value: Any, message: str) -> None:
    chunk = Chunk([1])
    setattr(chunk.config, field, value)
    with pytest.raises(ConfigError, match=message):
        RoutingReplay([chunk])
