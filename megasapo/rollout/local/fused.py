"""Qwen3 and Qwen3-MoE on a CPU in float32 with a third of the calls: transformers' arithmetic on its own parameters.

A small model's step is nothing but the overhead of some nine hundred small operations. Used by the forward pass, which
checks it against transformers' code when the server starts; attention and experts are the forward pass's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

MODEL_TYPES = ("qwen3", "qwen3_moe")

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
Experts = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def supported(model: PreTrainedModel) -> bool:
    """Exactly what `Fused` computes: other types, dtypes and settings run transformers' modules as they are."""
    config = model.config
    return (
        config.model_type in MODEL_TYPES
        and model.dtype is torch.float32
        and model.device.type == "cpu"
        and config.hidden_act == "silu"
        and not config.attention_bias
    )


@dataclass(frozen=True, slots=True)
class Layer:
    """Parameters of one decoder layer. `qkv` and `qk_norm` are their storage: the model's own are views of them."""

    index: int
    input_norm: torch.Tensor
    qkv: torch.Tensor  # [(heads + 2 * kv heads) * d, H]
    qk_norm: torch.Tensor  # [2, d]
    output: torch.Tensor
    post_norm: torch.Tensor
    mlp: Any
    is_moe: bool


class Fused:
    """Logits of packed tokens. Makes the model's q, k, v weights views of one tensor: build it before other views."""

    def __init__(self, model: PreTrainedModel, attend: Attend, experts: Experts) -> None:
        config: Any = model.config
        self._base: Any = model.model
        self._head = model.lm_head
        self._attend = attend
        self._experts = experts
        self._eps = config.rms_norm_eps
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._top_k = getattr(config, "num_experts_per_tok", 0)
        self._normalise = getattr(config, "norm_topk_prob", False)
        # which row of qk_norm each of the query and key heads takes
        self._kinds = torch.tensor([0] * self._heads + [1] * self._kv_heads)
        self._layers = [_layer(i, block) for i, block in enumerate(self._base.layers)]

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """[T] tokens and positions -> [len(keep), V]."""
        x = F.embedding(tokens, self._base.embed_tokens.weight)
        cos, sin = (t[0, :, None, : t.shape[-1] // 2] for t in self._base.rotary_emb(x, positions.unsqueeze(0)))
        for layer in self._layers:
            x = x + self._attention(layer, self._norm(x, layer.input_norm), cos, sin)
            x = x + self._mlp(layer, self._norm(x, layer.post_norm))
        return F.linear(self._norm(x[keep], self._base.norm.weight), self._head.weight)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x * x).mean(-1, keepdim=True).add_(self._eps).rsqrt_() * weight

    def _attention(self, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        both = self._heads + self._kv_heads
        qkv = F.linear(x, layer.qkv).view(x.shape[0], both + self._kv_heads, -1)
        qk = self._norm(qkv[:, :both], layer.qk_norm.index_select(0, self._kinds))
        a, b = qk.chunk(2, dim=-1)  # rotated by their positions
        qk = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        out = self._attend(layer.index, qk[:, : self._heads], qk[:, self._heads :], qkv[:, both:], qkv.shape[2] ** -0.5)
        return F.linear(out.reshape(x.shape[0], -1), layer.output)

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        mlp = layer.mlp
        if not layer.is_moe:
            inner = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
            return F.linear(inner, mlp.down_proj.weight)
        weight, index = F.linear(x, mlp.gate.weight).softmax(-1).topk(self._top_k, dim=-1)
        if self._normalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return self._experts(mlp.experts, x, index, weight)


def _layer(index: int, block: Any) -> Layer:
    attention = block.self_attn
    return Layer(
        index,
        block.input_layernorm.weight,
        _joined([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
        _joined([attention.q_norm.weight, attention.k_norm.weight]).view(2, -1),
        attention.o_proj.weight,
        block.post_attention_layernorm.weight,
        block.mlp,
        hasattr(block.mlp, "experts"),
    )


def _joined(parameters: list[torch.Tensor]) -> torch.Tensor:
    """One tensor that holds the parameters along their first dimension; they become its slices."""
    joined = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined
