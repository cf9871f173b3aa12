"""Attention with a sink: one more logit a head in the softmax, which takes weight and gives no value (gpt-oss).

Called by the learner's attention and by the embedded server's. Pure tensor arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EXTRA = 8  # coordinates added to a head: one is needed, kernels on GPUs want a multiple of 8


def attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, *, scale: float, mask: Tensor | None = None
) -> Tensor:
    """[b, heads, q, d] queries over [b, heads or a divisor, k, d] keys and values; as torch's SDPA, with sinks.

    sinks: what is added to exp() of the other logits, broadcast against [b, heads, q]. mask: bool (true: is seen) or
    additive, broadcast against [b, heads, q, k]; without one, the i-th query sees the first i keys.

    The sink is a key in front whose product with a query is the sink and whose value is 0: the query's extra coordinate
    holds the sink, the key's is 1. So SDPA's kernels do the rest, gradients included.
    """
    width = value.shape[-1]
    extra = (sinks / scale).to(query.dtype).expand(query.shape[:-1])[..., None]
    query = F.pad(torch.cat((query, extra), dim=-1), (0, EXTRA - 1))
    mark = F.one_hot(torch.tensor(query.shape[-1] - EXTRA, device=key.device), query.shape[-1]).to(key.dtype)
    key = torch.cat((mark.expand(*key.shape[:2], 1, -1), F.pad(key, (0, EXTRA))), dim=2)
    value = F.pad(value, (0, query.shape[-1] - width, 1, 0))
    grouped = query.shape[1] != key.shape[1]
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out[..., :width]
    query = F.pad(query, (0, 0, 1, 0))  # sees the sink only
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[..., 1:, :width]
