"""Block FP8 in SGLang on a CPU without AMX, where it has no kernels: products written out in torch.

sgl_cpu_plugin.py installs it on demand. Replaced are the arithmetic of Fp8LinearMethod and Fp8MoEMethod and their
re-packing of weights; SGLang's own code still makes the parameters, loads them and updates them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

LARGEST = 448.0


def install() -> None:
    from sglang.srt.layers.quantization import fp8

    # float32 so that a comparison with another engine is one of rounding to FP8 only
    fp8.Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: [torch.bfloat16, torch.float32])
    for method in (fp8.Fp8LinearMethod, fp8.Fp8MoEMethod):
        method.process_weights_after_loading = lambda self, layer: None
    fp8.Fp8LinearMethod.apply = _linear
    fp8.Fp8MoEMethod.create_moe_runner = _keep_config
    fp8.Fp8MoEMethod.apply = _experts


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """[T, K] by groups of 128 of each token."""
    groups = x.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / LARGEST
    return ((groups / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


def _weight(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = scale.repeat_interleave(128, dim=-2)[..., : values.shape[-2], :]
    return (values.float() * wide.repeat_interleave(128, dim=-1)[..., : values.shape[-1]]).to(dtype)


def _linear(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(_rounded(x), _weight(layer.weight, layer.weight_scale_inv, x.dtype), bias)


def _keep_config(self: Any, layer: Any, moe_runner_config: Any) -> None:
    self.moe_runner_config = moe_runner_config


def _experts(self: Any, layer: Any, dispatch_output: Any) -> Any:
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    x = dispatch_output.hidden_states
    weights, ids, _ = dispatch_output.topk_output
    gate_up = _weight(layer.w13_weight, layer.w13_weight_scale_inv, x.dtype)
    down = _weight(layer.w2_weight, layer.w2_weight_scale_inv, x.dtype)
    rounded, out = _rounded(x), torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(rounded[token], gate_up[expert]).chunk(2, dim=-1)
        inner = _rounded(F.silu(gate) * up)
        out.index_add_(0, token, weights[token, place, None].to(x.dtype) * F.linear(inner, down[expert]))
    return StandardCombineInput(hidden_states=out)
