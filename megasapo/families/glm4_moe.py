"""GLM-4.5 (HF model_type `glm4_moe`): half of each head rotated, dense first layers, a shared expert, and routers that
choose by sigmoid scores with a bias.

Layers for multi-token prediction, which released checkpoints have after the last one, are not trained: see mtp.py.
"""

from __future__ import annotations

from typing import Any

from megasapo.families import decoder
from megasapo.families.decoder import (
    DEEPSEEK_EXPERTS,
    EMBEDDING,
    HEAD,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    PROJECTION,
    QK_NORM,
    QKV,
    QKV_BIAS,
)
from megasapo.families.family import Family
from megasapo.families.sizes import Fields, Geometry
from megasapo.families.weights import WeightTable


def _transformer_fields(hf: Any, sizes: Geometry) -> dict[str, Any]:
    return decoder.transformer_fields(hf, sizes) | decoder.sigmoid_router(hf)


def _geometry(fields: Fields) -> Geometry:
    expert = fields.size("moe_intermediate_size")
    return Geometry(
        **decoder.sizes(fields),
        **decoder.expert_sizes(fields, "n_routed_experts", "num_local_experts"),
        moe_layers=decoder.dense_first(fields),
        moe_ffn=expert,
        shared_ffn=fields.size("n_shared_experts", default=1) * expert,
        qk_norm=fields.flag("use_qk_norm", default=False),
        qkv_bias=fields.flag("attention_bias", default=False),
    )


ATTENTION = (INPUT_NORM, QKV, QKV_BIAS, *QK_NORM, PROJECTION, MLP_NORM)
WEIGHTS = WeightTable((EMBEDDING, *ATTENTION, *MLP, *DEEPSEEK_EXPERTS, *HEAD), mtp_layers=True)
FAMILY = Family(_geometry, _transformer_fields, WEIGHTS)
