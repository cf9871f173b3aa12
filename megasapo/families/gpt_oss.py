"""gpt-oss (HF model_type `gpt_oss`): sinks in attention, a sliding window in some layers, YaRN, biases in every linear
layer and router, and experts with a clamped gated unit, all of a layer in one tensor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megasapo.config import ConfigError
from megasapo.families import decoder
from megasapo.families.decoder import EMBEDDING, HEAD, HF, INPUT_NORM, MCORE, MLP_NORM, PROJECTION, QKV, QKV_BIAS
from megasapo.families.family import Family, Rotary, head_dim, rotary
from megasapo.families.sizes import Fields, Geometry
from megasapo.families.weights import Rule, WeightTable, columns, of_all_experts, rows, whole

SLIDING = "sliding_attention"
RELEASED = (
    "released gpt-oss checkpoints hold their experts in MXFP4, which is neither trained nor published: make a copy in "
    "bfloat16 with transformers, AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.bfloat16, "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(TARGET), and of the tokenizer; then use TARGET"
)

# Sizes


def _geometry(fields: Fields) -> Geometry:
    if fields.config.get("quantization_config") is not None:
        raise ConfigError(f"{fields.source}: has a quantization_config; {RELEASED}")
    layers, window = fields.size("num_hidden_layers"), fields.size("sliding_window", default=128)
    kinds = fields.config.get("layer_types") or [SLIDING, "full_attention"] * layers
    return Geometry(
        **decoder.sizes(fields, default_head_dim=64),
        **decoder.expert_sizes(fields, "num_local_experts", "num_experts"),
        moe_layers=(True,) * layers,
        moe_ffn=fields.size("intermediate_size"),
        qk_norm=False,
        qkv_bias=True,
        biases=True,
        sinks=True,
        windows=tuple(window if kind == SLIDING else 0 for kind in kinds[:layers]),
    )


# TransformerConfig


def _transformer_fields(hf: Any, sizes: Geometry) -> dict[str, Any]:
    decoder.require(hf, attention_bias=True, swiglu_alpha=1.702)
    sliding = [kind == SLIDING for kind in hf.layer_types]
    return {
        **decoder.transformer_fields(hf, sizes),
        **decoder.softmax_router(sizes, normalised=True),
        "bias_dropout_fusion": False,  # not with biases in Transformer Engine's grouped experts
        "activation_func": "quick_gelu",
        "activation_func_clamp_value": hf.swiglu_limit,
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "window_size": (hf.sliding_window - 1, 0) if any(sliding) else None,  # a token's own key is not counted
        "window_attn_skip_freq": [int(x) for x in sliding],
        "apply_rope_fusion": False,  # not with YaRN
    }


def _rotary(hf: Any) -> Rotary:
    rope = hf.rope_parameters
    if rope.get("rope_type", "default") != "yarn":
        return rotary(hf)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return Rotary(
        float(rope["rope_theta"]),
        head_dim(hf),
        scaled=partial(ROPE_INIT_FUNCTIONS["yarn"], hf),
        yarn={
            "rotary_scaling_factor": rope["factor"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "beta_fast": rope.get("beta_fast") or 32.0,
            "beta_slow": rope.get("beta_slow") or 1.0,
            "mscale": rope.get("mscale"),
            "mscale_all_dim": rope.get("mscale_all_dim"),
            "correction_range_round_to_int": rope.get("truncate", True),
        },
    )


# Weights

EXPERTS = MCORE + "mlp.experts."


def _experts(linear: str, hf: str, matrix: Any, bias: Any, turns: int) -> tuple[Rule, Rule]:
    """Of one product of all experts of a layer: matrix and bias."""
    one, grouped = f"{EXPERTS}local_experts.{{expert}}.{linear}", f"{EXPERTS}{linear}"
    return (
        Rule((f"{one}.weight", grouped + ".weight{expert}"), (f"{HF}mlp.experts.{hf}",), of_all_experts(matrix, turns)),
        Rule((f"{one}.bias", grouped + ".bias{expert}"), (f"{HF}mlp.experts.{hf}_bias",), of_all_experts(bias, turns)),
    )


FAMILY = Family(
    _geometry,
    _transformer_fields,
    WeightTable(
        (
            EMBEDDING,
            INPUT_NORM,
            Rule((f"{MCORE}self_attention.core_attention.softmax_offset",), (f"{HF}self_attn.sinks",), rows),
            QKV,
            QKV_BIAS,
            PROJECTION,
            Rule((f"{MCORE}self_attention.linear_proj.bias",), (f"{HF}self_attn.o_proj.bias",), whole),
            MLP_NORM,
            Rule((f"{MCORE}mlp.router.weight",), (f"{HF}mlp.router.weight",), whole),
            Rule((f"{MCORE}mlp.router.bias",), (f"{HF}mlp.router.bias",), whole),
            *_experts("linear_fc1", "gate_up_proj", rows, rows, turns=2),  # gate and up alternate
            *_experts("linear_fc2", "down_proj", columns, whole, turns=1),
            *HEAD,
        )
    ),
    rotary=_rotary,
)
