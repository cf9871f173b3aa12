"""One forward pass of transformers' model over packed tokens of many sequences, on this package's own KV cache.

Called by the engine; knows nothing of requests. Attention and experts are hooked in through transformers' own
AttentionInterface and ExpertsInterface, so the model's code stays transformers'.

A step packs all tokens into one row of length T: first the sequences that decode one token each (cache rows 0..D-1),
then the prompts that are prefilled. No padding passes through the linear layers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from megasapo.errors import UserError
from megasapo.rollout.local import fused
from megasapo.rollout.local.cache import GRAIN, Cache
from megasapo.rollout.local.fused import Fused
from megasapo.sinks import attend_with_sinks

_names = itertools.count()  # attention and experts are registered by name, once for each model
DEFAULT_CACHE_BYTES = 2 << 30
DENSE_EXPERTS_MACS = 1 << 22  # below this many multiply-adds, all experts in one product beat sorting tokens by expert


@dataclass(slots=True)
class Plan:
    """The tokens of one step and where they go."""

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, position in its sequence
    slots: torch.Tensor  # [T * kv heads] int64, see Cache.slots
    num_decode: int  # D
    decode_mask: torch.Tensor | None  # [D * kv heads, 1, longest] additive, None when D is 0
    decode_length: int  # longest
    prefill_lengths: list[int]  # tokens of each prefilled prompt
    routed: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # (layer, [T, K] expert ids)
    window_masks: dict[int, torch.Tensor] = field(default_factory=dict)  # decode_mask of layers with such a window


class Forward:
    """The model with its attention and experts on the packed layout, and the cache it writes to."""

    def __init__(
        self, model: PreTrainedModel, max_cells: int | None, max_rows: int, record_routing: bool, plain: bool = False
    ) -> None:
        self._model = model
        self._record_routing = record_routing
        self._plan: Plan | None = None
        self._probe: list[tuple[int, int, int]] | None = None
        self._layer_of: dict[int, int] = {}
        name = f"megasapo_packed_{next(_names)}"
        AttentionInterface.register(name, self._attention)
        model.set_attn_implementation(name)
        self._hook_experts(name)
        self.cache = self._make_cache(max_cells, max_rows)
        self._fused: Fused | None = None
        if fused.supported(model) and not plain:
            self._fused = Fused(model, self._attend, self._experts)
            self._check_fused()

    def _hook_experts(self, name: str) -> None:
        """Experts modules of transformers that take an implementation have `_apply_gate`."""
        self._layer_of = {id(m): _layer_index(n) for n, m in self._model.named_modules() if hasattr(m, "_apply_gate")}
        if self._layer_of:
            ExpertsInterface.register(name, self._experts)
            self._model.set_experts_implementation(name)
        elif self._record_routing:
            raise ValueError(f"--enable-return-routed-experts: {type(self._model).__name__} has no experts to record")

    def _make_cache(self, max_cells: int | None, max_rows: int) -> Cache:
        """Run one token, to see what attention is given and that it is supported."""
        seen: list[tuple[int, int, int]] = []  # kv heads, key size, value size of each layer
        self._probe = seen
        with torch.inference_mode():
            self._model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self._model.device), use_cache=False)
        self._probe = None
        if len(set(seen)) != 1:
            raise NotImplementedError(f"layers with different key and value shapes: {sorted(set(seen))}")
        heads, key_size, value_size = seen[0]
        cell_bytes = len(seen) * heads * (key_size + value_size) * self._model.dtype.itemsize
        cells = max_cells or DEFAULT_CACHE_BYTES // cell_bytes
        if cells < GRAIN:
            raise UserError(f"--max-total-tokens {cells}: the KV cache is allocated by {GRAIN} tokens, use more")
        cells = cells // GRAIN * GRAIN
        return Cache(len(seen), heads, cells, max_rows, self._model.device)

    def _check_fused(self) -> None:
        """Raise unless the fused arithmetic gives what transformers' code gives, on a prompt of 32 tokens."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self._model.config.vocab_size, (32,), generator=generator)
        positions = torch.arange(32)
        self.cache.reserve(1, 32)
        plan = Plan(tokens, positions, self.cache.slots(positions * 0, positions), 0, None, 0, [32])
        with torch.inference_mode():
            got = self(plan, positions)
            kept, self._fused = self._fused, None
            want = self(plan, positions)
        self._fused = kept
        self.cache.release()
        worst, scale = float((got - want).abs().max()), float(want.abs().max())
        if not worst <= 1e-3 * max(1.0, scale):
            raise RuntimeError(
                f"fused {self._model.config.model_type} differs from transformers' by {worst:.2e} (logits up to "
                f"{scale:.2e}): start with --plain-forward, and please report this with the versions of both"
            )

    def __call__(self, plan: Plan, keep: torch.Tensor) -> torch.Tensor:
        """Logits [len(keep), V] float32 at the packed positions `keep`; fills plan.routed when routing is recorded."""
        self._plan = plan
        if self._fused is not None:
            logits = self._fused(plan.tokens, plan.positions, keep)
        else:
            out = self._model(
                input_ids=plan.tokens.unsqueeze(0),
                position_ids=plan.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=keep,
            )
            logits = out.logits[0].float()
        self._plan = None
        return logits

    def _attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, heads, T, d]
        key: torch.Tensor,  # [1, kv heads, T, d]
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        for name in ("softcap", "position_bias"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{type(module).__name__}: attention with {name} is not implemented")
        if self._probe is not None:
            self._probe.append((key.shape[1], key.shape[3], value.shape[3]))
            return value.transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[1], dim=2), None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        layer: Any = module.layer_idx
        out = self._attend(layer, q, k, v, scaling, kwargs.get("sliding_window"), kwargs.get("s_aux"))
        return out.unsqueeze(0), None

    def _attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float | None,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, heads, d] of the plan's tokens, each over its own sequence; keys and values go to the cache.

        `window`: each token sees so many keys, its own included. `sinks` [heads]: see megasapo.sinks.
        """
        plan = self._plan
        assert plan is not None
        keys, values = self.cache.write(layer, plan.slots, k, v)
        num_decode, parts = plan.num_decode, []
        if num_decode:
            past_k, past_v = (x[:num_decode, :, : plan.decode_length] for x in (keys, values))
            mask = _decode_mask(plan, window)
            parts.append(_attend_one(q[:num_decode], past_k, past_v, mask, scaling, sinks))
        start = num_decode
        for length in plan.prefill_lengths:
            end = start + length
            q_part, k_part, v_part = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            parts.append(_attend_all(q_part, k_part, v_part, window, scaling, sinks)[0].transpose(0, 1))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _experts(
        self, module: Any, hidden: torch.Tensor, top_index: torch.Tensor, top_weight: torch.Tensor
    ) -> torch.Tensor:
        if self._record_routing and self._plan is not None:
            self._plan.routed.append((self._layer_of[id(module)], top_index))
        num_experts, width, size = module.gate_up_proj.shape if _plain(module) else (0, 0, 0)
        if not num_experts or hidden.shape[0] * num_experts * width * size * 3 // 2 > DENSE_EXPERTS_MACS:
            return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, top_index, top_weight)
        # Few tokens and small experts: every expert for every token, weighted by zero where it was not chosen.
        up = F.linear(hidden, module.gate_up_proj.view(num_experts * width, size))  # [T, E * 2I]
        inner = module._apply_gate(up.view(-1, num_experts, width))  # [T, E, I]
        weight = hidden.new_zeros(hidden.shape[0], num_experts).scatter_(1, top_index, top_weight.to(hidden.dtype))
        inner = (inner * weight.unsqueeze(-1)).transpose(0, 1)  # [E, T, I]
        return torch.bmm(inner, module.down_proj.transpose(1, 2)).sum(0)


def _attend_all(
    query: torch.Tensor,  # [1, heads, n, d], the tokens of a prompt
    key: torch.Tensor,  # [1, kv heads, n, d]
    value: torch.Tensor,
    window: int | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention within a prompt: [1, heads, n, d]."""
    length, mask = query.shape[2], None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    if sinks is not None:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return attend_with_sinks(query, key, value, sinks[:, None], scale=scale, mask=mask)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _decode_mask(plan: Plan, window: int | None) -> torch.Tensor:
    """The plan's, which also hides what lies before a layer's window."""
    assert plan.decode_mask is not None
    if window is None or window >= plan.decode_length:
        return plan.decode_mask
    if window not in plan.window_masks:
        rows = plan.positions[: plan.num_decode].repeat_interleave(len(plan.decode_mask) // plan.num_decode)
        before = torch.arange(plan.decode_length, device=rows.device) <= rows[:, None, None] - window
        plan.window_masks[window] = plan.decode_mask.masked_fill(before, float("-inf"))
    return plan.window_masks[window]


def _attend_one(
    query: torch.Tensor,  # [D, heads, d], one token of each row
    keys: torch.Tensor,  # [D, kv heads, length, d]
    values: torch.Tensor,
    decode_mask: torch.Tensor,  # [D * kv heads, 1, length]
    scaling: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one query a row over its cache: [D, heads, d]."""
    rows, kv_heads, length, _ = keys.shape
    grouped = query.reshape(rows, kv_heads, -1, query.shape[2])
    if sinks is not None:
        scale = query.shape[2] ** -0.5 if scaling is None else scaling
        mask = decode_mask.to(query.dtype).view(rows, kv_heads, 1, length)
        out = attend_with_sinks(grouped, keys, values, sinks.view(kv_heads, -1), scale=scale, mask=mask)
        return out.reshape(rows, query.shape[1], -1)
    if query.dtype is not torch.float32 or query.device.type != "cpu" or scaling is None:
        mask = decode_mask.to(query.dtype).view(rows, kv_heads, 1, length)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
        return out.reshape(rows, query.shape[1], -1)
    # On CPU the fused kernel is slow for single queries at 64 rows; in fp32 plain products do as well.
    flat = [x.flatten(0, 1) for x in (grouped, keys, values)]
    scores = torch.baddbmm(decode_mask, flat[0], flat[1].transpose(1, 2), alpha=scaling)
    return torch.bmm(scores.softmax(-1), flat[2]).view(rows, query.shape[1], -1)


def _plain(module: Any) -> bool:
    """Whether the experts are the common kind: concatenated gate and up, no bias, no extra norm."""
    return bool(
        module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
    )


def _layer_index(name: str) -> int:
    """`model.layers.3.mlp.experts` -> 3."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise ValueError(f"cannot tell the layer of {name}")
    return numbers[0]
