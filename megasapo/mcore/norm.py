"""Root-mean-square norm for megatron-core's spec without Transformer Engine, in one autograd function.

model.py puts it into the layer spec. It knows nothing of layouts but a mark on its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 whose weight takes part in sequence parallelism; torch's wrapper refuses that."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps): backward makes half the passes over memory that autograd would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        normed, grad = x * scale, _wide(grad_out)
        products = (normed * grad).reshape(-1, size)
        grad_weight = products.sum(0).to(weight.dtype)
        # mean of normed * (weight * grad), the part of the gradient that the scale takes back
        along = torch.mv(products, weight.to(products.dtype)).div_(-size).view(scale.shape)
        return (grad * weight).addcmul_(normed, along).mul_(scale).to(x.dtype), grad_weight, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
