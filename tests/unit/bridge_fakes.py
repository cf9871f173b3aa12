"""Stand-ins for GPTModel chunks: the state dict names and shapes of a small Qwen3-MoE under either layer spec."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from megasapo.mcore.bridge.placement import Locals

H, HEADS, KV, HEAD, FFN, MOE_FFN, EXPERTS, VOCAB, LAYERS = 8, 4, 2, 4, 12, 6, 4, 13, 4
DENSE_LAYER = 0
HF_MOE = {"model_type": "qwen3_moe", "vocab_size": VOCAB}


class FakeModel:
    """What placement.py reads of a GPTModel."""

    def __init__(self, tensors: dict[str, torch.Tensor], layers: list[int], groups: Any, tied: bool) -> None:
        self.tensors = tensors
        self.decoder = SimpleNamespace(layers=[SimpleNamespace(layer_number=n + 1) for n in layers])
        self.pg_collection = groups
        self.share_embeddings_and_output_weights = tied
        self.config = SimpleNamespace(
            num_moe_experts=EXPERTS, num_attention_heads=HEADS, num_query_groups=KV, num_layers=LAYERS
        )

    def state_dict(self, keep_vars: bool = False) -> Mapping[str, torch.Tensor]:
        return self.tensors

    def parameters(self) -> Any:
        return self.tensors.values()


def fake_model(
    spec: str,
    tp: tuple[int, int] = (0, 1),
    pp: tuple[int, int] = (0, 1),
    ep: tuple[int, int] = (0, 1),
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """One chunk, full of NaN, of a rank given by (rank, size) in each group; experts are not cut by tp."""
    per_stage = LAYERS // pp[1]
    layers = list(range(pp[0] * per_stage, (pp[0] + 1) * per_stage))
    is_first, is_last = pp[0] == 0, pp[0] == pp[1] - 1
    vocab_rows = -(-VOCAB // tp[1])
    shapes: dict[str, tuple[int, ...]] = {}
    if is_first:
        shapes["embedding.word_embeddings.weight"] = (vocab_rows, H)
    for local, layer in enumerate(layers):
        shapes |= _layer_shapes(f"decoder.layers.{local}.", spec, layer == DENSE_LAYER, tp[1], EXPERTS // ep[1])
    if is_last:
        shapes["decoder.final_layernorm.weight"] = (H,)
        if not (tied and is_first):
            shapes["output_layer.weight"] = (vocab_rows, H)
    rank_of_stage = max(tp[0], ep[0])
    groups = SimpleNamespace(
        tp=_group(*tp),
        ep=_group(*ep),
        expt_tp=_group(0, 1),
        dp_cp=_group(rank_of_stage // tp[1], 99),
        expt_dp=_group((tp[0] if ep[1] == 1 else 0), 99),
    )
    tensors = {name: torch.full(shape, float("nan"), dtype=dtype) for name, shape in shapes.items()}
    if spec == "te":
        tensors["decoder.layers.0.self_attention.core_attention._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    return FakeModel(tensors, layers, groups, tied)


def fill_from(mine: Locals, hf: dict[str, torch.Tensor]) -> None:
    """Fill a rank's tensors from random HF tensors, which are drawn when first asked for."""
    for placed in mine.placed:
        placed.tensor.zero_()
        for piece in placed.pieces:
            name, shape = placed.names[piece.source], placed.shapes[piece.source]
            value = hf.setdefault(name, torch.randn(shape).to(placed.tensor.dtype))
            local = tuple(slice(*bounds) for bounds in piece.local)
            placed.tensor[local] = value[tuple(slice(*bounds) for bounds in piece.hf)]


def _layer_shapes(prefix: str, spec: str, is_dense: bool, tp: int, experts: int) -> dict[str, tuple[int, ...]]:
    te = spec == "te"
    attention, mlp = f"{prefix}self_attention.", f"{prefix}mlp."
    norm_before_mlp = f"{mlp}linear_fc1.layer_norm_weight" if te and is_dense else f"{prefix}pre_mlp_layernorm.weight"
    shapes: dict[str, tuple[int, ...]] = {
        f"{attention}linear_qkv.layer_norm_weight" if te else f"{prefix}input_layernorm.weight": (H,),
        f"{attention}linear_proj.weight": (H, HEADS * HEAD // tp),
        f"{attention}linear_qkv.weight": ((HEADS + 2 * KV) * HEAD // tp, H),
        f"{attention}q_layernorm.weight": (HEAD,),
        f"{attention}k_layernorm.weight": (HEAD,),
        norm_before_mlp: (H,),
    }
    if is_dense:
        return shapes | {f"{mlp}linear_fc1.weight": (2 * FFN // tp, H), f"{mlp}linear_fc2.weight": (H, FFN // tp)}
    shapes[f"{mlp}router.weight"] = (EXPERTS, H)
    for i in range(experts):
        fc1, fc2 = (
            (f"experts.linear_{fc}.weight{i}" if te else f"experts.local_experts.{i}.linear_{fc}.weight")
            for fc in ("fc1", "fc2")
        )
        shapes |= {mlp + fc1: (2 * MOE_FFN, H), mlp + fc2: (H, MOE_FFN)}
    return shapes


def _group(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)
