"""DeepSeek-V3 and R1 (HF model_type `deepseek_v3`): latent attention, dense first layers, a shared expert, and routers
that choose by sigmoid scores with a bias, within groups.

Layers for multi-token prediction, which released checkpoints have after the last one, are not trained: see mtp.py.
"""

from __future__ import annotations

from typing import Any

from megasapo.config import ConfigError
from megasapo.families import decoder
from megasapo.families.decoder import DEEPSEEK_EXPERTS, EMBEDDING, HEAD, HF, MCORE, MLP, MLP_NORM, PROJECTION
from megasapo.families.family import Family, Rotary
from megasapo.families.sizes import Fields, Geometry, Latent
from megasapo.families.weights import Layout, Rule, WeightTable, rows, whole

# Sizes


def _geometry(fields: Fields) -> Geometry:
    heads, expert = fields.size("num_attention_heads"), fields.size("moe_intermediate_size")
    if (kv_heads := fields.size("num_key_value_heads", default=heads)) != heads:
        raise ConfigError(
            f"{fields.source}: num_key_value_heads={kv_heads} is not num_attention_heads={heads}: latent attention has "
            "keys and values for every head"
        )
    latent = Latent(
        q_rank=fields.size("q_lora_rank", default=0),
        kv_rank=fields.size("kv_lora_rank"),
        plain=fields.size("qk_nope_head_dim"),
        rotated=fields.size("qk_rope_head_dim"),
        value=fields.size("v_head_dim"),
    )
    return Geometry(
        model_type=fields.config["model_type"],
        hidden=fields.size("hidden_size"),
        heads=heads,
        kv_heads=heads,
        head_dim=latent.plain + latent.rotated,
        vocab=fields.size("vocab_size"),
        tied=fields.flag("tie_word_embeddings", default=False),
        moe_layers=decoder.dense_first(fields),
        ffn=fields.size("intermediate_size"),
        **decoder.expert_sizes(fields, "n_routed_experts", "num_local_experts"),
        moe_ffn=expert,
        shared_ffn=fields.size("n_shared_experts", default=1) * expert,
        latent=latent,
    )


# TransformerConfig


def _transformer_fields(hf: Any, sizes: Geometry) -> dict[str, Any]:
    decoder.require(hf, attention_bias=False, rope_interleave=True)
    return {
        **decoder.transformer_fields(hf, sizes),
        **decoder.sigmoid_router(hf),
        "multi_latent_attention": True,
        "q_lora_rank": hf.q_lora_rank,
        "kv_lora_rank": hf.kv_lora_rank,
        "qk_head_dim": hf.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.qk_rope_head_dim,
        "v_head_dim": hf.v_head_dim,
        **_rotation(hf),
    }


def _rotation(hf: Any) -> dict[str, Any]:
    """Latent attention rotates by itself, adjacent values in pairs, and scales its scores as YaRN says."""
    rope = hf.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {
            "rope_type": "rope",
            "rotary_base": rope["rope_theta"],
            "rotary_scaling_factor": 1.0,
            "apply_rope_fusion": False,  # megatron-core has it for YaRN only
        }
    unknown = {name: rope.get(name, usual) for name, usual in (("attention_factor", None), ("truncate", True))}
    mscale, everywhere = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if kind != "yarn" or unknown != {"attention_factor": None, "truncate": True} or (everywhere and not mscale):
        raise ConfigError(
            f"rope_parameters={dict(rope)} are not supported for {hf.model_type}: only rope_type 'default', and 'yarn' "
            "without attention_factor or truncate, and with mscale where it has mscale_all_dim"
        )
    return {
        "rope_type": "yarn",
        "rotary_base": rope["rope_theta"],
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": mscale if everywhere else 1.0,  # transformers takes it only beside the other
        "mscale_all_dim": everywhere,
    }


def _rotary(hf: Any) -> Rotary:
    return Rotary(float(hf.rope_parameters["rope_theta"]), hf.qk_rope_head_dim)


# Weights


def _matrix(mcore: str, hf: str, layout: Layout) -> Rule:
    return Rule((f"{MCORE}self_attention.{mcore}.weight",), (f"{HF}self_attn.{hf}.weight",), layout)


def _norm(mcore: str, inside: str, hf: str) -> Rule:
    """`inside`: the linear layer that has the norm with Transformer Engine."""
    names = f"{MCORE}self_attention.{mcore}.weight", f"{MCORE}self_attention.{inside}.layer_norm_weight"
    return Rule(names, (f"{HF}self_attn.{hf}.weight",), whole)


ATTENTION = (
    Rule((f"{MCORE}input_layernorm.weight",), (f"{HF}input_layernorm.weight",), whole),
    _matrix("linear_q_proj", "q_proj", rows),  # without a latent of queries
    _matrix("linear_q_down_proj", "q_a_proj", whole),
    _norm("q_layernorm", "linear_q_up_proj", "q_a_layernorm"),
    _matrix("linear_q_up_proj", "q_b_proj", rows),
    _matrix("linear_kv_down_proj", "kv_a_proj_with_mqa", whole),
    _norm("kv_layernorm", "linear_kv_up_proj", "kv_a_layernorm"),
    _matrix("linear_kv_up_proj", "kv_b_proj", rows),
    PROJECTION,
    MLP_NORM,
)
WEIGHTS = WeightTable((EMBEDDING, *ATTENTION, *MLP, *DEEPSEEK_EXPERTS, *HEAD), mtp_layers=True)
FAMILY = Family(_geometry, _transformer_fields, WEIGHTS, rotary=_rotary)
