"""Routing replay on megatron-core's own routers, without process groups: what is recorded, forced and recomputed.

Whole models are replayed in tests/dist/test_replay.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megasapo.mcore.replay import RoutingReplay
from megasapo.routing.validate import UNKNOWN
from tests.unit.routers import (
    FLAVOURS,
    TOP_K,
    Chunk,
    Wrapper,
    batch,
    by_formula,
    gradients,
    inputs,
    random_routing,
)


def test_recorded_are_the_top_k_of_each_layer_best_first() -> None:
    chunk = Chunk([2, 4])
    replay = RoutingReplay([Wrapper(chunk)])
    assert replay.layers == (1, 3)
    x = inputs(0).detach()
    for gradient in (False, True):  # megatron-core 0.19 sorts top-k only with gradients
        with torch.set_grad_enabled(gradient), replay.record(chunk, batch()):
            chunk(x)
        (routing,) = replay.take()
        first = (x @ chunk.routers[0].weight.t()).topk(TOP_K).indices
        second = (chunk.layer(0, x) @ chunk.routers[1].weight.t()).topk(TOP_K).indices
        assert routing.dtype == torch.uint8
        assert routing.tolist() == torch.stack([first, second], 1).tolist()
    assert replay.take() == []


def test_compared_are_the_choices_at_forced_inputs() -> None:
    """Each router says what it would have chosen, while all before it were forced, and what that is worth to it."""
    chunk = Chunk([2, 4])
    replay = RoutingReplay([chunk])
    x, forced = inputs(3).detach(), random_routing(2, seed=4)
    forced_or_not = forced.to(torch.int16)
    forced_or_not[7] = UNKNOWN
    with torch.no_grad():
        with replay.compare(chunk, batch(forced_or_not)):
            compared = chunk(x)
        with replay.replay(chunk, batch(forced_or_not)):
            replayed = chunk(x)
    (choices,), (given_up,) = replay.take(), replay.take_given_up()
    assert torch.equal(compared, replayed)
    used = forced.clone()
    used[7] = choices[7]
    torch.testing.assert_close(compared, by_formula(chunk, x, used))
    one = Chunk([2])  # the first layer alone
    one.load_state_dict({k: v for k, v in chunk.state_dict().items() if k.split(".")[1] == "0"})
    for column, given in enumerate((x, by_formula(one, x, used[:, :1]))):
        logits = given @ chunk.routers[column].weight.t()
        best = logits.topk(TOP_K)
        assert choices[:, column].tolist() == best.indices.tolist()
        lost = best.values.sum(1) - logits.gather(1, used[:, column].long()).sum(1)
        torch.testing.assert_close(given_up[:, column], lost.detach(), rtol=1e-4, atol=1e-5)
    assert given_up[7].tolist() == [0.0, 0.0]
    assert replay.take() == replay.take_given_up() == []


def test_micro_batches_and_chunks_are_put_together_in_order() -> None:
    chunks = [Chunk([1, 2]), Chunk([5])]
    replay = RoutingReplay(chunks)
    alone = []
    for chunk in chunks:
        for seed in (0, 1):
            with torch.no_grad(), replay.record(chunk, batch()):
                chunk(inputs(seed))
            alone.append(replay._recorded[chunk][-1])
    routings = replay.take()
    assert [r.tolist() for r in routings] == [torch.cat([alone[i], alone[2 + i]], 1).tolist() for i in (0, 1)]
    assert routings[0].tolist() != routings[1].tolist()


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_a_foreign_routing_is_the_formula_and_its_gradient_reaches_the_router(unit: int) -> None:
    chunk, routing = Chunk([1, 2, 3]), random_routing(3)
    replay = RoutingReplay([chunk])
    expected = by_formula(chunk, inputs(0), routing)
    (expected**2).sum().backward()
    wanted = gradients(chunk)
    natural = chunk(inputs(0))
    with replay.step():
        with replay.replay(chunk, batch(routing)):
            out = chunk(inputs(0), unit)
        (out**2).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert (out - natural).abs().max() > 0.1
    for got, want in zip(gradients(chunk), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(w.abs().max() > 1e-3 for w in wanted), "a router or a table got no gradient"


@pytest.mark.parametrize("unit", [0, 1, 3])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_its_own_routing_changes_nothing_bit_for_bit(flavour: str, unit: int) -> None:
    chunk = Chunk([1, 2, 3], **FLAVOURS[flavour])
    dtype = chunk.config.params_dtype
    native = chunk(inputs(0, dtype))
    native.float().square().sum().backward()
    wanted = gradients(chunk)
    replay = RoutingReplay([chunk])
    with torch.no_grad(), replay.record(chunk, batch()):
        recorded = chunk(inputs(0, dtype))
    (routing,) = replay.take()
    with replay.step():
        with replay.replay(chunk, batch(routing)):
            out = chunk(inputs(0, dtype), unit)
        out.float().square().sum().backward()
    assert torch.equal(out, native)
    assert torch.equal(recorded, native)
    for got, want in zip(gradients(chunk), wanted, strict=True):
        assert torch.equal(got, want)
    with replay.step():
        with replay.replay(chunk, batch(random_routing(3))):
            assert not torch.equal(chunk(inputs(0, dtype)), native)


# (chunk, micro-batch); F forward, B backward. Interleaved: two chunks a stage, as the second of two stages runs them.
ORDERS = {
    "one by one": "F00 F10 B10 B00 F01 F11 B11 B01 F02 F12 B12 B02",
    "1F1B": "F00 F10 F01 F11 B10 B00 F02 F12 B11 B01 B12 B02",
    "interleaved": "F00 F01 F10 B10 F11 B11 F02 B00 B01 F12 B12 B02",
    "all forward first": "F00 F01 F02 F10 F11 F12 B10 B11 B12 B00 B01 B02",
}


@pytest.mark.parametrize("units", [(0, 0, 0), (1, 1, 1), (2, 2, 2), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_every_schedule_recomputes_with_the_routing_of_its_micro_batch(order: str, units: tuple[int, ...]) -> None:
    chunks = [Chunk([1, 2]), Chunk([3, 4])]
    routings = [random_routing(4, seed=micro) for micro in range(3)]
    for micro, routing in enumerate(routings):
        middle = by_formula(chunks[0], inputs(micro), routing[:, :2])
        by_formula(chunks[1], middle, routing[:, 2:]).square().sum().backward()
    wanted = [g for chunk in chunks for g in gradients(chunk)]
    replay = RoutingReplay(chunks)
    entered: dict[tuple[int, int], Tensor] = {}
    left: dict[tuple[int, int], Tensor] = {}
    with replay.step():
        for action in ORDERS[order].split():
            c, m = int(action[1]), int(action[2])
            if action[0] == "F":
                # like a pipeline, hidden states are handed over as leaves
                entered[c, m] = inputs(m) if c == 0 else left[0, m].detach().requires_grad_()
                with replay.replay(chunks[c], batch(routings[m])):
                    left[c, m] = chunks[c](entered[c, m], units[m])
            elif c == 1:
                left[c, m].square().sum().backward()
            else:
                left[c, m].backward(entered[1, m].grad)
    for got, want in zip([g for chunk in chunks for g in gradients(chunk)], wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", [0, 2])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_int16_with_and_without_unknown_rows_changes_nothing_bit_for_bit(flavour: str, unit: int) -> None:
    chunk = Chunk([1, 2, 3], **FLAVOURS[flavour])
    replay = RoutingReplay([chunk])

    def run(routing: Tensor | None) -> list[Tensor]:
        with replay.step() if routing is not None else nullcontext():
            with replay.replay(chunk, batch(routing)) if routing is not None else nullcontext():
                out = chunk(inputs(0, chunk.config.params_dtype), unit)
            out.float().square().sum().backward()
        return [out, *gradients(chunk)]

    foreign = random_routing(3)
    unknown_everywhere = torch.full(foreign.shape, UNKNOWN, dtype=torch.int16)
    natural, forced = run(None), run(foreign)
    for got, want in ((run(unknown_everywhere), natural), (run(foreign.short()), forced)):
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    held = foreign.short()
    held[:, 2] = UNKNOWN  # the layers below a cut
    for other in (natural, forced):
        assert not torch.equal(run(held)[0], other[0])


def test_unknown_rows_are_routed_by_the_router() -> None:
    chunk = Chunk([1, 2])
    replay = RoutingReplay([chunk])
    forced = random_routing(2).to(torch.int16)
    forced[::2, 0] = UNKNOWN
    forced[1::3, 1] = UNKNOWN
    with torch.no_grad(), replay.replay(chunk, batch(forced)):
        out = chunk(inputs(0))
    first = (inputs(0) @ chunk.routers[0].weight.t()).topk(TOP_K).indices
    known = forced.clone().long()
    known[::2, 0] = first[::2]
    middle = torch.tanh(by_formula(_first_layer(chunk), inputs(0), known[:, :1]).atanh())
    known[1::3, 1] = (middle @ chunk.routers[1].weight.t()).topk(TOP_K).indices[1::3]
    torch.testing.assert_close(out, by_formula(chunk, inputs(0), known), rtol=1e-5, atol=1e-5)


def _first_layer(chunk: Chunk) -> Any:
    return SimpleNamespace(routers=chunk.routers[:1], tables=[chunk.tables[0]])
