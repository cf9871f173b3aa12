"""What decoders of the Llama line have in common: grouped-query attention, gated feed-forward parts, experts.

The modules of families put these together: sizes, fields of megatron-core's TransformerConfig, rules for weights.
"""

from __future__ import annotations

from typing import Any

from megasapo.config import ConfigError
from megasapo.families.sizes import Fields, Geometry
from megasapo.families.weights import Rule, columns, gate_up, qkv, vocab, whole

# Sizes


def sizes(fields: Fields, default_head_dim: int | None = None) -> dict[str, Any]:
    """Geometry's fields without experts. `default_head_dim`: when config.json has none; None: of the hidden size."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(
            f"{fields.source}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    return {
        "model_type": fields.config["model_type"],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": fields.size("head_dim", default=default_head_dim or hidden // heads),
        "vocab": fields.size("vocab_size"),
        "tied": fields.flag("tie_word_embeddings", default=False),
        "ffn": fields.size("intermediate_size"),
    }


def expert_sizes(fields: Fields, *names: str) -> dict[str, Any]:
    """Geometry's numbers of experts; `names`: spellings of the field that has it."""
    experts, top_k = fields.size(*names), fields.size("num_experts_per_tok")
    if top_k > experts:
        raise ConfigError(f"{fields.source}: num_experts_per_tok={top_k} is more than the {experts} experts")
    return {"experts": experts, "top_k": top_k}


def sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Which layers have experts, as Qwen's configurations say it."""
    layers, step = fields.size("num_hidden_layers"), fields.size("decoder_sparse_step", default=1)
    dense = set(fields.config.get("mlp_only_layers") or ())
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


def dense_first(fields: Fields) -> tuple[bool, ...]:
    """Which layers have experts where the first are dense, as DeepSeek's and GLM's configurations say it."""
    layers, dense = fields.size("num_hidden_layers"), fields.config.get("first_k_dense_replace", 1)
    if type(dense) is not int or not 0 <= dense <= layers:
        raise ConfigError(f"{fields.source}: first_k_dense_replace={dense!r} is no number of the {layers} layers")
    return tuple(i >= dense for i in range(layers))


# TransformerConfig


def require(hf: Any, **wanted: Any) -> None:
    """ConfigError unless these fields of a transformers configuration have these values."""
    for name, value in wanted.items():
        if getattr(hf, name) != value:
            raise ConfigError(f"{name}={getattr(hf, name)!r} is not supported for {hf.model_type}; only {value!r} is")


def require_full_attention(hf: Any) -> None:
    """ConfigError where some layers see the last tokens only."""
    if getattr(hf, "use_sliding_window", False):
        raise ConfigError("use_sliding_window=true is not supported; only full attention is")


def transformer_fields(hf: Any, sizes: Geometry) -> dict[str, Any]:
    """All but how a router chooses."""
    require(hf, hidden_act="silu")
    fields = {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.ffn,
        "num_attention_heads": sizes.heads,
        "num_query_groups": sizes.kv_heads,
        "kv_channels": sizes.head_dim,
        "init_method_std": hf.initializer_range,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "qk_layernorm": sizes.qk_norm,
        "gated_linear_unit": True,
        "add_bias_linear": sizes.biases,
        "add_qkv_bias": sizes.qkv_bias,
    }
    if not sizes.experts:
        return fields
    return fields | {
        "num_moe_experts": sizes.experts,
        "moe_layer_freq": [int(has_experts) for has_experts in sizes.moe_layers],
        "moe_ffn_hidden_size": sizes.moe_ffn,
        "moe_shared_expert_intermediate_size": sizes.shared_ffn or None,
        "moe_shared_expert_gate": sizes.shared_gate,
        "moe_router_topk": sizes.top_k,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def softmax_router(sizes: Geometry, *, normalised: bool) -> dict[str, Any]:
    """A router that takes the softmax over all experts; `normalised`: and divides by the sum of the chosen ones."""
    if normalised and sizes.top_k == 1:
        raise ConfigError(
            f"num_experts_per_tok=1 with normalised scores is not supported for {sizes.model_type}: every chosen "
            "expert's weight would be 1, and no router could be trained"
        )
    # the softmax over the chosen ones alone is the same as normalising afterwards
    return {"moe_router_pre_softmax": not normalised}


def sigmoid_router(hf: Any) -> dict[str, Any]:
    """DeepSeek-V3's router: sigmoid scores, a bias that only takes part in choosing, groups, normalised and scaled.

    The bias stays as it is: in megatron-core's update, at its own rate, nothing asks for it in RL.
    """
    top_k, groups, chosen = hf.num_experts_per_tok, hf.n_group or 1, hf.topk_group or 1
    if bool(hf.norm_topk_prob) != (top_k > 1):
        raise ConfigError(
            f"norm_topk_prob={hf.norm_topk_prob} with num_experts_per_tok={top_k} is not supported for "
            f"{hf.model_type}: megatron-core normalises the scores of the chosen experts exactly when there are several"
        )
    if groups > 1 and top_k // chosen != 2:  # transformers takes each group's best two, megatron-core that many
        raise ConfigError(
            f"num_experts_per_tok={top_k} with topk_group={chosen} is not supported for {hf.model_type}: megatron-core "
            "compares groups as transformers does only where two experts of each chosen group are taken"
        )
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": chosen if groups > 1 else None,
        "moe_router_topk_scaling_factor": hf.routed_scaling_factor,
    }


# Weights

MCORE = "decoder.layers.{layer}."
HF = "model.layers.{layer}."

EMBEDDING = Rule(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), vocab)
INPUT_NORM = Rule(
    (f"{MCORE}input_layernorm.weight", f"{MCORE}self_attention.linear_qkv.layer_norm_weight"),
    (f"{HF}input_layernorm.weight",),
    whole,
)
QKV = Rule(
    (f"{MCORE}self_attention.linear_qkv.weight",),
    (f"{HF}self_attn.q_proj.weight", f"{HF}self_attn.k_proj.weight", f"{HF}self_attn.v_proj.weight"),
    qkv,
)
QKV_BIAS = Rule(
    (f"{MCORE}self_attention.linear_qkv.bias",),
    (f"{HF}self_attn.q_proj.bias", f"{HF}self_attn.k_proj.bias", f"{HF}self_attn.v_proj.bias"),
    qkv,
)
QK_NORM = (
    Rule((f"{MCORE}self_attention.q_layernorm.weight",), (f"{HF}self_attn.q_norm.weight",), whole),
    Rule((f"{MCORE}self_attention.k_layernorm.weight",), (f"{HF}self_attn.k_norm.weight",), whole),
)
PROJECTION = Rule((f"{MCORE}self_attention.linear_proj.weight",), (f"{HF}self_attn.o_proj.weight",), columns)
MLP_NORM = Rule(
    (f"{MCORE}pre_mlp_layernorm.weight", f"{MCORE}mlp.linear_fc1.layer_norm_weight"),
    (f"{HF}post_attention_layernorm.weight",),
    whole,
)
MLP = (
    Rule((f"{MCORE}mlp.linear_fc1.weight",), (f"{HF}mlp.gate_proj.weight", f"{HF}mlp.up_proj.weight"), gate_up),
    Rule((f"{MCORE}mlp.linear_fc2.weight",), (f"{HF}mlp.down_proj.weight",), columns),
)
HEAD = (
    Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), whole),
    Rule(("output_layer.weight",), ("lm_head.weight",), vocab),
)


def experts(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Rule, ...]:
    """Router and routed experts, by the names that HF gives the block and an expert's three matrices."""
    hf, mcore = f"{HF}{block}.experts.{{expert}}.", f"{MCORE}mlp.experts."
    return (
        Rule((f"{MCORE}mlp.router.weight",), (f"{HF}{block}.gate.weight",), whole),
        Rule(
            (mcore + "local_experts.{expert}.linear_fc1.weight", mcore + "linear_fc1.weight{expert}"),
            (f"{hf}{gate}.weight", f"{hf}{up}.weight"),
            gate_up,
        ),
        Rule(
            (mcore + "local_experts.{expert}.linear_fc2.weight", mcore + "linear_fc2.weight{expert}"),
            (f"{hf}{down}.weight",),
            columns,
        ),
    )


def shared_experts(name: str) -> tuple[Rule, ...]:
    """The expert that every token passes, by the name that HF gives it."""
    hf, mcore = f"{HF}mlp.{name}.", f"{MCORE}mlp.shared_experts."
    return (
        Rule((f"{mcore}linear_fc1.weight",), (f"{hf}gate_proj.weight", f"{hf}up_proj.weight"), gate_up),
        Rule((f"{mcore}linear_fc2.weight",), (f"{hf}down_proj.weight",), columns),
    )


EXPERT_BIAS = Rule(
    (f"{MCORE}mlp.router.expert_bias",), (f"{HF}mlp.gate.e_score_correction_bias",), whole, keeps_dtype=True
)
# those of a sigmoid router, and the shared ones
DEEPSEEK_EXPERTS = (*experts(), EXPERT_BIAS, *shared_experts("shared_experts"))
