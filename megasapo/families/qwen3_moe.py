"""Qwen3-MoE (HF model_type `qwen3_moe`): dense Qwen3, with experts in the layers that have them."""

from __future__ import annotations

from typing import Any

from megasapo.families import decoder, qwen3
from megasapo.families.decoder import EMBEDDING, HEAD, MLP
from megasapo.families.family import Family
from megasapo.families.sizes import Fields, Geometry
from megasapo.families.weights import WeightTable


def _transformer_fields(hf: Any, sizes: Geometry) -> dict[str, Any]:
    return qwen3.transformer_fields(hf, sizes) | decoder.softmax_router(sizes, normalised=hf.norm_topk_prob)


def _geometry(fields: Fields) -> Geometry:
    return Geometry(
        **decoder.sizes(fields),
        **decoder.expert_sizes(fields, "num_experts", "num_local_experts"),  # transformers 5 writes the second name
        moe_layers=decoder.sparse_layers(fields),
        moe_ffn=fields.size("moe_intermediate_size"),
    )


FAMILY = Family(
    _geometry, _transformer_fields, WeightTable((EMBEDDING, *qwen3.ATTENTION, *MLP, *decoder.experts(), *HEAD))
)
