"""Multi-head latent attention of the DeepSeek line: megatron-core's, with what it lacks outside Transformer Engine.

model.py puts LatentAttention into the layer spec in place of MLASelfAttention. Rotation is megatron-core's own here, so
the core attention gets rotated queries and keys. It knows nothing of weights' names or of process groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

LATENT_EPS = 1e-6  # of the norms of latents in transformers' deepseek_v3, whatever rms_norm_eps is


def use_latent_attention(block: TransformerBlockSubmodules) -> None:
    """Put LatentAttention into the layers of a spec that have latent attention; others are left as they are."""
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        if attention.module is MLASelfAttention:
            attention.module = LatentAttention


class LatentAttention(MLASelfAttention):
    """MLASelfAttention whose down projections are whole on every tensor-parallel rank, as under Transformer Engine.

    megatron-core's spec without it cuts them and gathers what they give, and the gathering's backward (0.16.1 to
    0.19.2) hands each rank its own part of the rotated key's gradient only, which is a sum over all ranks' heads.
    """

    def __init__(self, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            cut = getattr(self, name, None)
            if isinstance(cut, ColumnParallelLinear):
                setattr(self, name, WholeLinear(config, cut.input_size, cut.output_size))
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            norm: Any = getattr(self, name, None)
            if hasattr(norm, "eps"):  # of Transformer Engine's linear layers, those with a norm inside
                norm.eps = LATENT_EPS

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """As the spec says, and as 0.16.1 does; 0.19.2 wants Transformer Engine where queries have no latent."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class WholeLinear(nn.Module):
    """A linear layer without bias that every tensor-parallel rank holds and applies to its own tokens."""

    def __init__(self, config: Any, input_size: int, output_size: int) -> None:
        super().__init__()
        weight = torch.empty(output_size, input_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = nn.Parameter(weight)
        config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        own = self._forward_impl(input=x, weight=self.weight, bias=None, sequence_parallel=False, allreduce_dgrad=False)
        return own, None

    def _forward_impl(self, *, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        """With the arguments of megatron-core's linear layers, so that emulation.py can stand in."""
        return F.linear(input, weight)
