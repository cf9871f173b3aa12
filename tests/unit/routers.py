"""Chunks of megatron-core's own routers whose output is a formula of the routing: chains of x + gate @ table layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megasapo.mcore  # noqa: F401 (before megatron)

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
