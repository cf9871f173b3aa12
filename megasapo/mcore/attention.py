"""Causal attention and rotary embedding for packed sequences on plain torch, where Transformer Engine is not available.

model.py puts `PackedAttention` into megatron-core's layer spec and calls `pack` once for every micro-batch; what `pack`
returns travels with it through the layers. A pack is attended in a few dense calls: sequences are grouped by length, so
padding stays below a factor of two, and no T x T mask exists. Under context parallelism a rank's queries meet the keys
and values of all ranks, gathered. It knows nothing of losses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megasapo.data.packing import WHOLE, Shard
from megasapo.families.family import Rotary
from megasapo.sinks import attend_with_sinks


@dataclass(frozen=True)
class Bucket:
    """Stretches of queries of similar length, padded on the right, and the keys that each may see."""

    num: int  # stretches
    queries: Tensor  # [num * longest] int64: which of this rank's tokens stands in each slot
    keys: Tensor  # [num * longest] int64, into the keys of all ranks
    mask: Tensor | None  # [num, 1, longest query, longest key] bool; None: the i-th query sees the first i keys


@dataclass(frozen=True)
class Plan:
    """How a pack is laid out for attention; `inverse` finds each of the rank's tokens in the concatenated buckets."""

    buckets: tuple[Bucket, ...]
    inverse: Tensor  # [Tc] int64


@dataclass
class Packed(PackedSeqParams):
    """megatron-core's packed-sequence parameters, with what our own attention needs."""

    plan: Plan | None = None
    window_plan: Plan | None = None  # of layers with a sliding window
    cos: Tensor | None = None  # [Tc, 1, rotary dim] fp32, as sin
    sin: Tensor | None = None
    cp_group: dist.ProcessGroup | None = None  # None without context parallelism


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of a sequence that are consecutive on this rank."""

    first: int  # among this rank's tokens
    length: int
    start: int  # of its sequence, in the whole pack
    visible: int  # keys that its last token may see; the others one less each

    def cut(self, window: int) -> Iterator[Stretch]:
        """Parts of at most `window` tokens, none of which sees keys that no token of the part may see."""
        for at in range(0, self.length, window):
            length = min(window, self.length - at)
            visible = self.visible - self.length + at + length
            hidden = max(0, visible - length + 1 - window)
            yield Stretch(self.first + at, length, self.start + hidden, visible - hidden)


def pack(
    cu_seqlens: Tensor,
    max_seqlen: int,
    position_ids: Tensor,
    *,
    rotary: Rotary,
    window: int | None = None,
    shard: Shard = WHOLE,
    cp_group: dist.ProcessGroup | None = None,
) -> Packed:
    """Parameters of one pack for the spec without Transformer Engine: [S + 1] int32 boundaries, [Tc] positions.

    The angles of the rotary embedding are made here once for all layers. window: how many keys a token sees,
    its own included, in layers with a sliding window.
    """
    frequencies, scale = _frequencies(rotary, position_ids.device)
    angles = position_ids.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return Packed(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        plan=plan(cu_seqlens, shard),
        window_plan=plan(cu_seqlens, shard, window) if window else None,
        cos=angles.cos() * scale,
        sin=angles.sin() * scale,
        cp_group=cp_group,
    )


def _frequencies(rotary: Rotary, device: torch.device) -> tuple[Tensor, float]:
    """Radians a position of each pair, and what cosines and sines are multiplied by."""
    if rotary.scaled is not None:
        return rotary.scaled(device)
    exponent = torch.arange(0, rotary.dim, 2, dtype=torch.float32, device=device) / rotary.dim
    return 1.0 / rotary.theta**exponent, 1.0


def plan(cu_seqlens: Tensor, shard: Shard = WHOLE, window: int | None = None) -> Plan:
    """Group the stretches of a pack by length, each bucket's shortest more than half its longest.

    With a window stretches are cut to its length, so each meets less than twice as many keys.
    """
    bounds = cu_seqlens.cpu().numpy().astype(np.int64)
    key_rows = _rows_after_gathering(bounds, shard)
    inverse = np.empty(bounds[-1] // shard.cp, dtype=np.int64)
    buckets: list[Bucket] = []
    offset = 0
    for kind in _stretches(bounds, shard):
        if window:
            kind = [part for stretch in kind for part in stretch.cut(window)]
        left = sorted(kind, key=lambda s: (-s.length, s.first))
        while left:
            num = next((i for i, s in enumerate(left) if 2 * s.length <= left[0].length), len(left))
            queries, keys, mask = _slots(left[:num], window)
            # A padded query repeats the stretch's last token, and its output is not read.
            real = np.arange(queries.shape[1]) < np.array([s.length for s in left[:num]])[:, None]
            inverse[queries[real]] = offset + np.flatnonzero(real)
            offset += queries.size
            parts = (queries.reshape(-1), key_rows[keys.reshape(-1)], mask)
            on_device = [None if x is None else torch.from_numpy(x).to(cu_seqlens.device) for x in parts]
            buckets.append(Bucket(num, *on_device))  # type: ignore[arg-type]
            left = left[num:]
    return Plan(tuple(buckets), torch.from_numpy(inverse).to(cu_seqlens.device))


def _stretches(bounds: np.ndarray, shard: Shard) -> list[list[Stretch]]:
    """This rank's stretches, by kind: those of one kind see keys in the same proportion to their length."""
    spans = [(int(start), int(end - start)) for start, end in itertools.pairwise(bounds) if end > start]
    if shard.cp == 1:
        return [[Stretch(start, length, start, length) for start, length in spans]]
    kinds = []
    for half, number in enumerate((shard.cp_rank, 2 * shard.cp - 1 - shard.cp_rank)):
        kind = []
        for start, length in spans:
            chunk = length // (2 * shard.cp)
            kind.append(Stretch(start // shard.cp + half * chunk, chunk, start, (number + 1) * chunk))
        kinds.append(kind)
    return kinds


def _slots(stretches: list[Stretch], window: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """[num, longest] tokens and [num, most keys] keys in the whole pack, repeating the last one, and who sees whom."""
    first, length, start, visible = (
        np.array([getattr(s, name) for s in stretches])[:, None] for name in ("first", "length", "start", "visible")
    )
    query = np.arange(length.max())[None, :]
    key = np.arange(visible.max())[None, :]
    queries = first + np.minimum(query, length - 1)
    keys = start + np.minimum(key, visible - 1)
    if (length == visible).all():  # plain causality hides padded keys from every real query
        return queries, keys, None
    last = (visible - length)[:, :, None] + query[:, :, None]
    mask = key[:, None, :] <= last
    if window:
        mask &= key[:, None, :] > last - window
    return queries, keys, mask[:, None]


def _rows_after_gathering(bounds: np.ndarray, shard: Shard) -> np.ndarray:
    """[T] where each slot of the pack stands among the keys of all context-parallel ranks, rank after rank."""
    held = [Shard(shard.cp, rank).context_slots(bounds) for rank in range(shard.cp)]
    rows = np.empty(bounds[-1], dtype=np.int64)
    rows[np.concatenate(held)] = np.arange(bounds[-1])
    return rows


class PackedAttention(torch.nn.Module):
    """Core attention of megatron-core's SelfAttention on torch's SDPA; causal, grouped queries, thd.

    Queries and keys come without rotary embedding, which is applied here; latent attention's come with it. With
    softmax_type=learnable each head has a sink, and the layers of window_attn_skip_freq see a sliding window; both as
    in megatron-core's own attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout} is not supported; use 0")
        self.scale = softmax_scale
        self.rotates = not getattr(config, "multi_latent_attention", False)
        self.is_sliding = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            assert pg_collection is not None
            self._tp_group = pg_collection.tp
            sinks = torch.zeros(config.num_attention_heads // self._tp_group.size(), dtype=config.params_dtype)
            self.softmax_offset = torch.nn.Parameter(sinks)
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        elif config.softmax_type != "vanilla":
            raise ValueError(f"softmax_type={config.softmax_type!r} is not supported; use vanilla or learnable")

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As that of megatron-core's own attention: sinks are cut by heads."""
        if self.softmax_offset is None:
            return {}
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attended values: [Tc, heads, d] with keys and values of fewer heads, to [Tc, heads * d]."""
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("attention is causal within each sequence; masks and biases are not supported")
        p = packed_seq_params
        if not isinstance(p, Packed) or p.plan is None or p.cos is None or p.sin is None:
            raise ValueError(
                "the model runs on packed sequences: pass packed_seq_params made by megasapo.mcore.attention"
            )
        if self.rotates:
            cos, sin = p.cos.to(query.dtype), p.sin.to(query.dtype)
            query, key = (_rotated(x, cos, sin) for x in (query, key))
        if p.cp_group is not None:
            widths = (key.shape[-1], value.shape[-1])
            both = gather_from_sequence_parallel_region(torch.cat((key, value), -1), group=p.cp_group)
            key, value = both.split(widths, -1)
        layout = p.window_plan if self.is_sliding else p.plan
        assert layout is not None
        parts = []
        for bucket in layout.buckets:
            q, k, v = (
                x.index_select(0, rows).unflatten(0, (bucket.num, -1)).transpose(1, 2)
                for x, rows in ((query, bucket.queries), (key, bucket.keys), (value, bucket.keys))
            )
            parts.append(self._attend(q, k, v, bucket.mask).transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(parts).index_select(0, layout.inverse)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[b, heads, s, d], keys and values with a divisor of the heads, to [b, heads, s, d]."""
        if self.softmax_offset is not None:
            scale = self.scale or query.shape[-1] ** -0.5
            return attend_with_sinks(query, key, value, self.softmax_offset[:, None], scale=scale, mask=mask)
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        width = value.shape[-1]
        if width < query.shape[-1]:  # latent attention's; torch's fused kernels want heads of one size
            value = F.pad(value, (0, query.shape[-1] - width))
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return out[..., :width]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[Tc, heads, d]: as many of the first values of each head as there are angles, turned; the rest as it is."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    one, two = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-two, one), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if width < x.shape[-1] else turned
