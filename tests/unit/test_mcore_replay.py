"""Routing replay on megatron-core's own routers, without process groups: what is recorded, forced, recomputed, refused.

A chunk here is a chain of x + gate @ table layers, so its output is a formula of the routing. Whole models are replayed
in tests/dist/test_replay.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megasapo.mcore  # noqa: F401 (before megatron)
from megasapo.config import ConfigError
from megasapo.mcore.replay import NATIVE, RoutingReplay, check_ids, cut_routing, narrowed, storage_dtype

HIDDEN, EXPERTS, TOP_K, TOKENS = 16, 6, 3, 20
FLAVOURS = {
    "softmax": {},
    "pre_softmax": {"moe_router_pre_softmax": True},
    "sigmoid_bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "grouped": {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 3,
        "moe_router_group_topk": 2,
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "bfloat16": {"params_dtype": torch.bfloat16, "bf16": True, "moe_router_dtype": "fp32"},
}


class Chunk(nn.Module):
    """Decoder layers `numbers` (from 1, as megatron counts) of a model whose other layers are elsewhere."""

    def __init__(self, numbers: list[int], num_layers: int = 8, **over: Any) -> None:
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.transformer.transformer_config import TransformerConfig

        super().__init__()
        fields: dict[str, Any] = {"num_layers": num_layers, "hidden_size": HIDDEN, "num_attention_heads": 1}
        fields |= {"num_moe_experts": EXPERTS, "moe_router_topk": TOP_K, "add_bias_linear": False}
        fields |= {"moe_router_load_balancing_type": "none", "moe_ffn_hidden_size": 4}
        self.config = TransformerConfig(**fields | over)
        groups = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
        self.routers = nn.ModuleList(TopKRouter(config=self.config, pg_collection=groups) for _ in numbers)
        dtype = self.config.params_dtype
        self.tables = nn.ParameterList(torch.empty(EXPERTS, HIDDEN, dtype=dtype) for _ in numbers)
        generator = torch.Generator().manual_seed(numbers[0] if numbers else 0)
        with torch.no_grad():
            for number, router in zip(numbers, self.routers, strict=True):
                router.set_layer_number(number)
                if router.expert_bias is not None:
                    router.expert_bias.copy_(torch.randn(EXPERTS, generator=generator))
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def layer(self, i: int, x: Tensor) -> Tensor:
        gates, _ = self.routers[i](x[:, None])
        return torch.tanh(x + gates.to(x.dtype) @ self.tables[i])

    def run(self, x: Tensor, first: int, last: int) -> Tensor:
        for i in range(first, last):
            x = self.layer(i, x)
        return x

    def forward(self, x: Tensor, unit: int = 0) -> Tensor:
        """`unit`: how many layers are recomputed together; 0: none are."""
        if not unit:
            return self.run(x, 0, len(self.routers))
        for first in range(0, len(self.routers), unit):
            last = min(first + unit, len(self.routers))
            x = checkpoint(self.run, x, first, last, use_reentrant=True, preserve_rng_state=False)
        return x


class Wrapper(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def batch(routing: Tensor | None = None, tokens: int = TOKENS) -> Any:
    return SimpleNamespace(routing=routing, loss_mask=torch.ones(tokens, dtype=torch.bool))


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(100 + seed))
    return x.to(dtype).requires_grad_()


def random_routing(layers: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(TOKENS, layers, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K].to(torch.uint8)


def gradients(chunk: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in chunk.parameters() if p.grad is not None]
    chunk.zero_grad()
    return found


def by_formula(chunk: Chunk, x: Tensor, routing: Tensor) -> Tensor:
    """The chunk with softmax gates, each token's experts given."""
    for i, router in enumerate(chunk.routers):
        logits = x @ router.weight.t()
        ids = routing[:, i].long()
        mixed = []
        for t in range(len(x)):
            gates = logits[t, ids[t]].softmax(-1)
            mixed.append(sum(gate * chunk.tables[i][expert] for gate, expert in zip(gates, ids[t], strict=True)))
        x = torch.tanh(x + torch.stack(mixed))
    return x


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
    forced_or_not[7] = NATIVE
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
def test_int16_with_and_without_native_changes_nothing_bit_for_bit(flavour: str, unit: int) -> None:
    chunk = Chunk([1, 2, 3], **FLAVOURS[flavour])
    replay = RoutingReplay([chunk])

    def run(routing: Tensor | None) -> list[Tensor]:
        with replay.step() if routing is not None else nullcontext():
            with replay.replay(chunk, batch(routing)) if routing is not None else nullcontext():
                out = chunk(inputs(0, chunk.config.params_dtype), unit)
            out.float().square().sum().backward()
        return [out, *gradients(chunk)]

    foreign = random_routing(3)
    everywhere_native = torch.full(foreign.shape, NATIVE, dtype=torch.int16)
    natural, forced = run(None), run(foreign)
    for got, want in ((run(everywhere_native), natural), (run(foreign.short()), forced)):
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    held = foreign.short()
    held[:, 2] = NATIVE  # the layers below a cut
    for other in (natural, forced):
        assert not torch.equal(run(held)[0], other[0])


def test_rows_of_native_are_routed_by_the_router() -> None:
    chunk = Chunk([1, 2])
    replay = RoutingReplay([chunk])
    forced = random_routing(2).to(torch.int16)
    forced[::2, 0] = NATIVE
    forced[1::3, 1] = NATIVE
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


@pytest.mark.parametrize(
    ("token", "layer", "ids", "message"),
    [
        (7, 1, [0, 6, 2], r"token 7 in layer 4 is \[0, 6, 2\]: experts \[6\] do not exist.*0 to 5"),
        (7, 0, [4, 1, 4], r"token 7 in layer 2 is \[4, 1, 4\]: an expert is chosen twice"),
        (7, 0, [1, 4, 4], "an expert is chosen twice"),
        (7, 0, [4, 4, 1], "an expert is chosen twice"),
        (0, 0, [-1, 1, 4], r"token 0 in layer 2 is \[-1, 1, 4\]: experts \[-1\] do not"),
        (0, 0, [-2, -2, -2], r"experts \[-2, -2, -2\] do not exist.*1 such rows of 40"),
        (0, 0, [-2, -1, -1], r"experts \[-2, -1, -1\] do not exist"),
    ],
)
def test_wrong_ids_are_refused_when_a_routing_is_made(token: int, layer: int, ids: list[int], message: str) -> None:
    routing = random_routing(2).short()
    routing[3] = NATIVE
    routing[token, layer] = torch.tensor(ids)
    with pytest.raises(ValueError, match=message):
        narrowed(routing.numpy(), EXPERTS, [2, 4])


def test_ids_up_to_the_last_expert_pass() -> None:
    check_ids(torch.tensor([[[255, 0]]], dtype=torch.uint8), 256, layers=[0])
    check_ids(torch.tensor([[[511, 0]], [[NATIVE, NATIVE]]], dtype=torch.int16), 512, layers=[0])
    with pytest.raises(ValueError, match=r"experts \[255\]"):
        check_ids(torch.tensor([[[255, 0]]], dtype=torch.uint8), 255, layers=[0])
    assert [storage_dtype(n) for n in (8, 256, 257, 2**15)] == [torch.uint8] * 2 + [torch.int16] * 2
    with pytest.raises(ValueError, match="at most 32768"):
        storage_dtype(2**15 + 1)


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


def test_whole_sequences_are_cut_to_a_ranks_slots_and_layers() -> None:
    rows = [np.arange(3 * 4 * 2).reshape(3, 4, 2), None, np.arange(100, 100 + 2 * 4 * 2).reshape(2, 4, 2)]
    # slots: 3 of sequence 0, padded to 4; 1 of sequence 1, padded to 2; 3 of sequence 2, whose last row is missing
    sequence = np.array([0, 0, 1, 2, 2, 3])
    position = np.array([1, 3, 0, 0, 2, 0])
    given = {"layers": [1, 3], "num_experts": 128, "top_k": 2}
    cut = cut_routing(rows, [3, 1, 3], sequence, position, **given)
    assert cut.dtype == torch.int16
    assert cut[0].tolist() == [[10, 11], [14, 15]]  # position 1 of sequence 0, layers 1 and 3
    assert cut[2].tolist() == cut[4].tolist() == [[NATIVE, NATIVE]] * 2
    assert cut[3].tolist() == [[102, 103], [106, 107]]
    check_ids(cut, 128, layers=[1, 3])
    known = cut_routing([rows[0]], [3], np.zeros(4, int), np.array([0, 2, 1, 3]), **given)
    assert known.dtype == torch.uint8
    assert known[:3, 0].tolist() == [[2, 3], [18, 19], [10, 11]]
    check_ids(known, 128, layers=[1, 3])  # the padding too


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (np.zeros((4, 4, 2), int), r"shape \[4, 4, 2\]: expected at most 3 tokens"),
        (np.zeros((3, 3, 2), int), r"shape \[3, 3, 2\].*more than 3 layers"),
        (np.zeros((3, 4, 1), int), "top-k 2"),
        (np.full((3, 4, 2), 256), "ids from 256 to 256, and the model has experts 0 to 127"),
        (np.full((3, 4, 2), -2), "ids from -2 to -2"),
        (np.full((3, 4, 2), 7), r"layer 1 is \[7, 7\]: an expert is chosen twice.*6 such rows of 6"),
    ],
)
def test_sequences_whose_rows_do_not_fit_are_refused(row: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_routing([row], [3], np.zeros(3, int), np.arange(3), layers=[1, 3], num_experts=128, top_k=2)
