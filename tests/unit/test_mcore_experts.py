"""Grouped experts against megatron-core's SequentialMLP, on one rank."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megasapo.mcore import experts
from megasapo.mcore.experts import GroupedExperts, grouped_swiglu, use_grouped_experts
from megasapo.mcore.optim import wrap_ddp
from megasapo.mcore.topology import Topology
from megasapo.sections import ParallelConfig

# megatron-core may only be imported once megasapo.mcore has been
from megatron.core.fusions.fused_bias_geglu import quick_gelu  # isort: skip
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # isort: skip
from megatron.core.transformer.mlp import MLPSubmodules  # isort: skip
from megatron.core.transformer.moe.experts import SequentialMLP  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

HIDDEN, FFN = 16, 24
COUNTS = {
    "all used": [3, 1, 4, 2],
    "empty ones": [0, 5, 0, 3],
    "one only": [0, 0, 9, 0],
    "none": [0, 0, 0, 0],
    "cut into blocks": [21, 0, 3, 9],
}
UNITS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gpt-oss": {  # values are clamped in about one place of four
        "activation_func": quick_gelu,
        "activation_func_clamp_value": 1.0,
        "glu_linear_offset": 1.0,
        "add_bias_linear": True,
    },
}
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}  # of a tensor's largest value


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    topo = Topology.init(ParallelConfig())
    yield
    topo.destroy()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "BLOCK_ROWS", 8)


def config(**over: Any) -> TransformerConfig:
    fields: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": 40,
        "moe_ffn_hidden_size": FFN,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "params_dtype": torch.float32,
        "bias_activation_fusion": False,
    }
    return TransformerConfig(**fields | over)


class ByFormula(SequentialMLP):
    """gpt-oss's experts as transformers has them; megatron-core's (0.16.1) cannot go backward with biases."""

    def forward(self, tokens: Tensor, counts: Tensor, gates: Tensor) -> tuple[Tensor, None]:
        out = []
        parts = zip(tokens.split(counts.tolist()), gates.split(counts.tolist()), self.local_experts, strict=True)
        for x, gate, expert in parts:
            a, b = (x @ expert.linear_fc1.weight.t() + expert.linear_fc1.bias).chunk(2, dim=1)
            a, b = a.clamp(max=1.0), b.clamp(-1.0, 1.0)
            hidden = (b + 1) * a * torch.sigmoid(1.702 * a)
            y = hidden @ expert.linear_fc2.weight.t() + expert.linear_fc2.bias
            out.append((y * gate[:, None]).to(tokens.dtype))
        return torch.cat(out), None


def pair(**over: Any) -> tuple[SequentialMLP, GroupedExperts]:
    """Experts to compare with and ours, with the same random weights."""
    made = []
    for kind in (ByFormula if over.get("add_bias_linear") else SequentialMLP, GroupedExperts):
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        made.append(kind(4, config(**over), submodules, pg_collection=groups))
    theirs, ours = made
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(counts: list[int], dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, counts and gates; gates are never narrower than fp32, as the router makes them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype)
    gates = torch.rand(sum(counts), generator=generator).to(torch.promote_types(dtype, torch.float32))
    return tokens.requires_grad_(), torch.tensor(counts), gates.requires_grad_()


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=0, atol=TOLERANCE[dtype] * largest, msg=lambda message: f"{name}: {message}"
    )


def gradients(module: torch.nn.Module, counts: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    tokens, per_expert, gates = inputs(counts, dtype)
    out, bias = module(tokens, per_expert, gates)
    assert bias is None
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    (out * weight).sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "tokens": tokens.grad, "gates": gates.grad, **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.usefixtures("one_rank", "small_blocks")
def test_forward_and_backward_are_those_of_sequential_mlp(
    counts: list[int], dtype: torch.dtype, unit: dict[str, Any]
) -> None:
    theirs, ours = pair(params_dtype=dtype, **unit)
    expected, found = gradients(theirs, counts, dtype), gradients(ours, counts, dtype)
    assert expected.keys() == found.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        assert_close(found[name], expected[name], dtype, name)


def test_written_numbers() -> None:
    # one expert, H = 2, F = 1: a = 1, b = 4, silu(1) = 0.731059, times 4, times the gate 0.5
    out = grouped_swiglu(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([0.5]),
        [1],
        [torch.tensor([[1.0, 0.0], [0.0, 2.0]])],
        [torch.tensor([[1.0], [-10.0]])],
    )
    torch.testing.assert_close(out, torch.tensor([[1.4621172, -14.621172]]))


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS.keys())
@pytest.mark.usefixtures("one_rank")
def test_products_whose_rounding_changes_nothing_give_the_same(unit: dict[str, Any]) -> None:
    def exact(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    exact.emulation = SimpleNamespace(on=True, recipe=SimpleNamespace(by_tensor=True))  # type: ignore[attr-defined]
    _, plain = pair(**unit)
    _, emulated = pair(**unit)
    emulated.roundings = exact, exact  # type: ignore[assignment]
    expected, found = (gradients(module, [3, 1, 4, 2], torch.float32) for module in (plain, emulated))
    for name in expected:
        assert_close(found[name], expected[name], torch.float32, name)


@pytest.mark.usefixtures("one_rank")
def test_names_and_checkpoint_entries_are_those_of_sequential_mlp() -> None:
    theirs, ours = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    expected, found = (m.sharded_state_dict("decoder.mlp.") for m in (theirs, ours))
    assert found.keys() == expected.keys()
    assert [found[k].key for k in found] == [expected[k].key for k in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("one_rank", "small_blocks")
def test_gradients_of_two_micro_batches_add_up_in_ddps_buffer(dtype: torch.dtype) -> None:
    sums = []
    for module in pair(params_dtype=dtype, bf16=dtype is torch.bfloat16):
        (ddp,) = wrap_ddp([module])
        ddp.zero_grad_buffer()
        for seed, counts in enumerate(([3, 0, 4, 2], [20, 5, 0, 1])):
            tokens, per_expert, gates = inputs(counts, dtype, seed)
            ddp(tokens, per_expert, gates)[0].square().sum().backward()
        assert all(p.grad is None for p in module.parameters())
        sums.append({name: p.main_grad for name, p in module.named_parameters()})
    for name, expected in sums[0].items():
        assert expected.dtype == torch.float32
        assert expected.abs().max() > 0
        assert_close(sums[1][name], expected, dtype, name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.usefixtures("one_rank", "small_blocks")
def test_recompute_gives_the_same_bits(reentrant: bool) -> None:
    _, ours = pair()
    plain = gradients(ours, [3, 0, 9, 2], torch.float32)
    ours.zero_grad()
    again = partial(torch.utils.checkpoint.checkpoint, ours.forward, use_reentrant=reentrant)
    ours_again = copy.copy(ours)
    ours_again.forward = again  # type: ignore[method-assign]
    for name, value in gradients(ours_again, [3, 0, 9, 2], torch.float32).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.usefixtures("one_rank", "small_blocks")
def test_without_gradients_the_values_are_the_same() -> None:
    _, ours = pair()
    tokens, per_expert, gates = inputs([3, 0, 9, 2], torch.float32)
    with torch.no_grad():
        out = ours(tokens, per_expert, gates)[0]
    assert out.grad_fn is None
    assert torch.equal(out, ours(tokens, per_expert, gates)[0])


@pytest.mark.usefixtures("one_rank")
def test_frozen_weights_and_experts_without_tokens_get_no_gradient_work(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[tuple[int, ...]] = []
    original = experts.WeightGradient.add

    def add(self: Any, grad_output: Tensor, values: Tensor) -> None:
        added.append((grad_output.shape[1], values.shape[1]))
        original(self, grad_output, values)

    monkeypatch.setattr(experts.WeightGradient, "add", add)
    _, ours = pair()
    for expert in ours.local_experts:
        expert.linear_fc2.weight.requires_grad_(False)
    gradients(ours, [0, 2, 0, 3], torch.float32)
    assert added == [(2 * FFN, HIDDEN)] * 2


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"gated_linear_unit": False}, "gated_linear_unit=False"),
        ({"activation_func": F.gelu}, "activation_func=.*gelu"),
        (
            {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
            "moe_apply_probs_on_input=True",
        ),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_other_experts_are_refused(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair(**over)


def test_counts_that_do_not_fit_are_refused() -> None:
    tokens, gates, fc1, fc2 = torch.ones(3, 2), torch.ones(3), torch.ones(4, 2), torch.ones(2, 2)
    with pytest.raises(ValueError, match="counts that sum to 4"):
        grouped_swiglu(tokens, gates, [1, 3], [fc1, fc1], [fc2, fc2])
    with pytest.raises(ValueError, match="1 counts for 2 and 2 weights"):
        grouped_swiglu(tokens, gates, [3], [fc1, fc1], [fc2, fc2])


def test_the_layer_spec_names_grouped_experts_where_there_are_experts() -> None:
    made = config(num_layers=2, moe_layer_freq=[0, 1])
    spec = get_gpt_decoder_block_spec(made, use_transformer_engine=False)
    dense, sparse = (layer.submodules.mlp for layer in spec.layer_specs)
    for mlp in (dense, sparse, sparse):  # layers share one spec: twice does no harm
        use_grouped_experts(mlp)
    kept = sparse.keywords["submodules"] if isinstance(sparse, partial) else sparse.submodules
    made_by = kept.experts.func if isinstance(kept.experts, partial) else kept.experts.module
    assert made_by is GroupedExperts
    assert "SequentialMLP" not in repr(sparse)
    assert "GroupedExperts" not in repr(dense)
