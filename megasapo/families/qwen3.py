"""Dense Qwen3 (HF model_type `qwen3`)."""

from __future__ import annotations

from typing import Any

from megasapo.families import decoder
from megasapo.families.decoder import EMBEDDING, HEAD, INPUT_NORM, MLP, MLP_NORM, PROJECTION, QK_NORM, QKV
from megasapo.families.family import Family
from megasapo.families.sizes import Fields, Geometry
from megasapo.families.weights import WeightTable

ATTENTION = (INPUT_NORM, QKV, *QK_NORM, PROJECTION, MLP_NORM)


def transformer_fields(hf: Any, sizes: Geometry) -> dict[str, Any]:
    decoder.require(hf, attention_bias=False)
    decoder.require_full_attention(hf)
    return decoder.transformer_fields(hf, sizes)


def _geometry(fields: Fields) -> Geometry:
    layers = fields.size("num_hidden_layers")
    return Geometry(**decoder.sizes(fields, default_head_dim=128), moe_layers=(False,) * layers)


FAMILY = Family(_geometry, transformer_fields, WeightTable((EMBEDDING, *ATTENTION, *MLP, *HEAD)))
