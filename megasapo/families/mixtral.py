"""Mixtral (HF model_type `mixtral`): every layer has experts, and its files call their matrices w1, w3 and w2."""

from __future__ import annotations

from typing import Any

from megasapo.families import decoder
from megasapo.families.decoder import EMBEDDING, HEAD, INPUT_NORM, MLP_NORM, PROJECTION, QKV
from megasapo.families.family import Family
from megasapo.families.sizes import Fields, Geometry
from megasapo.families.weights import WeightTable


def _transformer_fields(hf: Any, sizes: Geometry) -> dict[str, Any]:
    decoder.require(hf, sliding_window=None, router_jitter_noise=0.0)
    return decoder.transformer_fields(hf, sizes) | decoder.softmax_router(sizes, normalised=True)


def _geometry(fields: Fields) -> Geometry:
    return Geometry(
        **decoder.sizes(fields),
        **decoder.expert_sizes(fields, "num_local_experts", "num_experts"),
        moe_layers=(True,) * fields.size("num_hidden_layers"),
        moe_ffn=fields.size("intermediate_size"),
        qk_norm=False,
    )


EXPERTS = decoder.experts("block_sparse_moe", gate="w1", up="w3", down="w2")
WEIGHTS = WeightTable((EMBEDDING, INPUT_NORM, QKV, PROJECTION, MLP_NORM, *EXPERTS, *HEAD))
FAMILY = Family(_geometry, _transformer_fields, WEIGHTS)
