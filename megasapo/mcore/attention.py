"""Causal attention and rotary embedding for packed sequences on plain torch, where Transformer Engine is not available.

model.py puts these into megatron-core's layer spec; `pack` makes the parameters that travel with a micro-batch through
the model. A pack is attended in a few dense calls: sequences are grouped by length, so padding stays below a factor of
two, and no T x T mask exists. It knows nothing of losses or process groups; context parallelism is not supported here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, padded on the right to the longest of them."""

    num_sequences: int
    length: int
    rows: Tensor  # [num_sequences * length] int64: which packed token stands in each slot


@dataclass(frozen=True)
class Plan:
    """How a pack is laid out for attention; `inverse` finds each packed token in the concatenated buckets."""

    buckets: tuple[Bucket, ...]
    inverse: Tensor  # [T] int64


@dataclass
class Packed(PackedSeqParams):
    """megatron-core's packed-sequence parameters, with what our own attention and rotary embedding need."""

    plan: Plan | None = None
    position_ids: Tensor | None = None  # [T] int64


def pack(cu_seqlens: Tensor, max_seqlen: int, position_ids: Tensor) -> Packed:
    """Parameters of one pack for the spec without Transformer Engine: [S + 1] int32 boundaries, [T] positions.

    The padded boundaries describe one sequence of T tokens: megatron-core reads them only to apply rotary embeddings,
    which are already per token here, and would otherwise loop over sequences.
    """
    whole = cu_seqlens[[0, -1]]
    return Packed(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=whole,
        cu_seqlens_kv_padded=whole,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        plan=plan(cu_seqlens),
        position_ids=position_ids,
    )


def plan(cu_seqlens: Tensor) -> Plan:
    """Group the sequences of a pack by length, each bucket's shortest more than half its longest."""
    bounds = cu_seqlens.tolist()
    spans = sorted(((end - start, start) for start, end in itertools.pairwise(bounds) if end > start), reverse=True)
    inverse = torch.empty(bounds[-1], dtype=torch.int64, device=cu_seqlens.device)
    buckets: list[Bucket] = []
    offset = 0
    while spans:
        longest = spans[0][0]
        num = next((i for i, (length, _) in enumerate(spans) if 2 * length <= longest), len(spans))
        lengths, starts = torch.tensor(spans[:num], device=cu_seqlens.device)[:, :, None].unbind(1)
        within = torch.arange(longest, device=cu_seqlens.device)[None, :]
        # A slot past the end repeats the last token: causality hides it from every real token, its output is not read.
        rows = (starts + torch.minimum(within, lengths - 1)).view(-1)
        (real,) = (within < lengths).view(-1).nonzero(as_tuple=True)
        inverse[rows[real]] = real + offset
        buckets.append(Bucket(num, longest, rows))
        offset += len(rows)
        spans = spans[num:]
    return Plan(tuple(buckets), inverse)


class PackedAttention(torch.nn.Module):
    """Core attention of megatron-core's SelfAttention on torch's SDPA; causal, grouped queries, thd or sbhd."""

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(
                f"context_parallel_size={config.context_parallel_size} needs Transformer Engine's attention; use 1"
            )
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout} is not supported; use 0")
        self.scale = softmax_scale

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
        """Attended values: packed [T, heads, d] to [T, heads * d], or [s, b, heads, d] to [s, b, heads * d]."""
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("attention is causal within each sequence; masks and biases are not supported")
        if packed_seq_params is None:
            out = self._causal(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        layout = getattr(packed_seq_params, "plan", None) or plan(packed_seq_params.cu_seqlens_q)
        parts = []
        for bucket in layout.buckets:
            shape = (bucket.num_sequences, bucket.length)
            q, k, v = (x.index_select(0, bucket.rows).unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
            parts.append(self._causal(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(parts).index_select(0, layout.inverse)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, heads, s, d], keys and values with a divisor of the heads, to [b, heads, s, d]."""
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)


class PackedRotaryEmbedding(torch.nn.Module):
    """Rotary angles for every token of a pack, in place of megatron-core's table of positions.

    GPTModel asks for a sequence length and passes the answer on to `forward`; here both are the position ids.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.inv_freq = 1.0 / theta**exponent  # not a buffer: casting the model must not touch it

    def get_rotary_seq_len(self, *args: Any) -> Tensor:
        packed = args[-1]
        if not isinstance(packed, Packed) or packed.position_ids is None:
            raise ValueError(
                "the model runs on packed sequences: pass packed_seq_params made by megasapo.mcore.attention"
            )
        return packed.position_ids

    def forward(self, position_ids: Tensor, packed_seq: bool = True, cp_group: Any = None) -> Tensor:
        """[T] positions to [T, 1, 1, head_dim] fp32 angles, both halves alike."""
        angles = position_ids.float()[:, None] * self.inv_freq.to(position_ids.device)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
