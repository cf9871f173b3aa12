"""Which fused kernels of others megatron-core really takes: the optimizer's, and the weight gradient's accumulation.

model.py and optim.py build by it; a run says it at its start, and `megasapo doctor` without a model. It knows nothing
of models: whether layers are Transformer Engine's is given.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import megatron.core.optimizer
import torch
from megatron.core.tensor_parallel import layers

from megasapo import extensions

OPTIMIZERS = {
    "transformer_engine": "Transformer Engine's FusedAdam",
    "apex": "NVIDIA Apex's FusedAdam",
    "torch": "torch's AdamW",
}


@dataclass(frozen=True, slots=True)
class Fusions:
    """What is fused, and why the rest is not."""

    optimizer: str
    optimizer_why: str
    gradient_accumulation: bool  # products of weight gradients add into fp32 main_grad by themselves
    gradient_why: str

    @staticmethod
    def find(*, use_te: bool, on_gpu: bool) -> Fusions:
        """What a model on this machine gets; `use_te`: it is built of Transformer Engine's layers."""
        root = megatron.core.optimizer.Adam.__module__.split(".")[0]
        optimizer = OPTIMIZERS.get(root, f"{root}'s {megatron.core.optimizer.Adam.__name__}")
        if root == "torch":
            optimizer += ", one kernel for all weights" * on_gpu or ", fused on the CPU"
        accumulates, why = _gradient_accumulation(use_te=use_te, on_gpu=on_gpu)
        return Fusions(optimizer, _optimizer_why(root, on_gpu=on_gpu), accumulates, why)

    def lines(self) -> list[str]:
        """For people: one line each."""
        state = "on" if self.gradient_accumulation else "off"
        return [
            f"optimizer: {self.optimizer} ({self.optimizer_why})",
            f"gradient_accumulation_fusion: {state} ({self.gradient_why})",
        ]


def _optimizer_why(root: str, *, on_gpu: bool) -> str:
    if root == "transformer_engine":
        return "megatron-core's first choice"
    if not on_gpu:
        return "no GPU"
    te, apex = extensions.transformer_engine(), extensions.apex()
    missing = f"{te.name}: {te.problem}"
    return missing if root == "apex" else f"{missing}; apex: {apex.problem}"


def _gradient_accumulation(*, use_te: bool, on_gpu: bool) -> tuple[bool, str]:
    if use_te:
        return True, "Transformer Engine's layers do it themselves, our output head too"
    if not on_gpu:
        return False, "no GPU; our output head adds into main_grad by itself"
    if apex_kernel():
        return True, "NVIDIA Apex's fused_weight_gradient_mlp_cuda"
    return False, "without Transformer Engine's layers it needs NVIDIA Apex's fused_weight_gradient_mlp_cuda"


def apex_kernel() -> bool:
    """Whether the kernel is there that megatron-core's own linear layers need, and only they."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@contextmanager
def output_layer_without_kernel(*, use_te: bool) -> Iterator[None]:
    """Let a model of Transformer Engine's layers be built with gradient_accumulation_fusion and without Apex.

    0.16.1 to 0.19.2 refuse that where they make the output layer, the one linear layer that is still their own. Its
    product is not theirs here: head.py computes it and adds into main_grad.
    """
    before = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = before or use_te
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = before


def implementation(optimizers: list[torch.optim.Optimizer]) -> str:
    """The classes that were really made, which `optim.override_optimizer_config` may have changed."""
    names = {f"{type(one).__module__.split('.')[0]}.{type(one).__name__}" for one in optimizers if one is not None}
    return ", ".join(sorted(names)) or "none on this rank"
