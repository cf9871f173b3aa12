"""Qwen1.5-MoE and Qwen2-MoE (HF model_type `qwen2_moe`): biases of q, k, v, and a shared expert behind a gate."""

from __future__ import annotations

from typing import Any

from megasapo.families import decoder
from megasapo.families.decoder import EMBEDDING, HEAD, HF, INPUT_NORM, MCORE, MLP, MLP_NORM, PROJECTION, QKV, QKV_BIAS
from megasapo.families.family import Family
from megasapo.families.sizes import Fields, Geometry
from megasapo.families.weights import Rule, WeightTable, whole

SHARED_GATE = Rule((f"{MCORE}mlp.shared_experts.gate_weight",), (f"{HF}mlp.shared_expert_gate.weight",), whole)


def _transformer_fields(hf: Any, sizes: Geometry) -> dict[str, Any]:
    decoder.require_full_attention(hf)
    return decoder.transformer_fields(hf, sizes) | decoder.softmax_router(sizes, normalised=hf.norm_topk_prob)


def _geometry(fields: Fields) -> Geometry:
    return Geometry(
        **decoder.sizes(fields),
        **decoder.expert_sizes(fields, "num_experts", "num_local_experts"),
        moe_layers=decoder.sparse_layers(fields),
        moe_ffn=fields.size("moe_intermediate_size"),
        shared_ffn=fields.size("shared_expert_intermediate_size"),
        shared_gate=True,
        qk_norm=False,
        qkv_bias=fields.flag("qkv_bias", default=True),
    )


ATTENTION = (INPUT_NORM, QKV, QKV_BIAS, PROJECTION, MLP_NORM)
EXPERTS = (*decoder.experts(), *decoder.shared_experts("shared_expert"), SHARED_GATE)
FAMILY = Family(_geometry, _transformer_fields, WeightTable((EMBEDDING, *ATTENTION, *MLP, *EXPERTS, *HEAD)))
