"""Weight table of dense Qwen3 (HF model_type `qwen3`); qwen3_moe builds on it. Read by families.py."""

from megasapo.mcore.bridge.table import Family, Rule, columns, gate_up, qkv, vocab, whole

MCORE = "decoder.layers.{layer}."
HF = "model.layers.{layer}."

EMBEDDING = Rule(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), vocab)
ATTENTION = (
    Rule(
        (f"{MCORE}input_layernorm.weight", f"{MCORE}self_attention.linear_qkv.layer_norm_weight"),
        (f"{HF}input_layernorm.weight",),
        whole,
    ),
    Rule(
        (f"{MCORE}self_attention.linear_qkv.weight",),
        (f"{HF}self_attn.q_proj.weight", f"{HF}self_attn.k_proj.weight", f"{HF}self_attn.v_proj.weight"),
        qkv,
    ),
    Rule((f"{MCORE}self_attention.q_layernorm.weight",), (f"{HF}self_attn.q_norm.weight",), whole),
    Rule((f"{MCORE}self_attention.k_layernorm.weight",), (f"{HF}self_attn.k_norm.weight",), whole),
    Rule((f"{MCORE}self_attention.linear_proj.weight",), (f"{HF}self_attn.o_proj.weight",), columns),
    Rule(
        (f"{MCORE}pre_mlp_layernorm.weight", f"{MCORE}mlp.linear_fc1.layer_norm_weight"),
        (f"{HF}post_attention_layernorm.weight",),
        whole,
    ),
)
MLP = (
    Rule((f"{MCORE}mlp.linear_fc1.weight",), (f"{HF}mlp.gate_proj.weight", f"{HF}mlp.up_proj.weight"), gate_up),
    Rule((f"{MCORE}mlp.linear_fc2.weight",), (f"{HF}mlp.down_proj.weight",), columns),
)
HEAD = (
    Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), whole),
    Rule(("output_layer.weight",), ("lm_head.weight",), vocab),
)

FAMILY = Family((EMBEDDING, *ATTENTION, *MLP, *HEAD))
