"""Tiny random models on disk in HF format, with a byte-level BPE tokenizer: what tests and benchmarks run on.

`make_model` makes them; it needs transformers and tokenizers, no network, and takes well under a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megasapo.checksum import Checksum

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
MOE_SHAPE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

QWEN2_MOE_SHAPE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
MIXTRAL_SHAPE = {"num_local_experts": 8, "num_experts_per_tok": 2}
GLM4_MOE_SHAPE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 0,
}
DEEPSEEK_V3_SHAPE = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "head_dim": 8,  # transformers means the rotated part
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 64.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
}
GPT_OSS_SHAPE = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "sliding_window": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
    },
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' name for the family, and its fields beside SHAPE
    "moe": ("Qwen3Moe", MOE_SHAPE),
    "dense": ("Qwen3", {}),
    "qwen2_moe": ("Qwen2Moe", QWEN2_MOE_SHAPE),
    "mixtral": ("Mixtral", MIXTRAL_SHAPE),
    "glm4_moe": ("Glm4Moe", GLM4_MOE_SHAPE),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK_V3_SHAPE),
    "gpt_oss": ("GptOss", GPT_OSS_SHAPE),
}


def make_model(
    directory: str | Path,
    kind: str = "moe",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **over: Any,
) -> Path:
    """Write a random model of one of KINDS (512 ids, 4 layers) with tokenizer; `over` are config fields.

    Matrices are scaled up from transformers' initialisation so that logits, and so greedy tokens, are well apart.
    """
    # here, because ranks import this module for its constants, and these imports take longer than most tests
    import transformers

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        name, shape = KINDS[kind]
        config = getattr(transformers, f"{name}Config")(**{**SHAPE, **shape, **over})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(std=0.1)
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and not name.endswith("bias"):
                    parameter.mul_(5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)  # a norm weight of exactly one hides mistakes
    for parameter in model.parameters():  # not routers' biases: files have them in float32
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(directory)
    return directory


def add_mtp(directory: Path) -> dict[str, torch.Tensor]:
    """Give a model of `make_model` a layer for multi-token prediction, named as released files name it; its tensors."""
    from safetensors.torch import load_file, save_file

    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    vocab = tensors["model.embed_tokens.weight"]
    block = {new + name.removeprefix(last): value.flip(0) for name, value in tensors.items() if name.startswith(last)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        shapes = {
            "eh_proj": (hidden, 2 * hidden),
            "enorm": (hidden,),
            "hnorm": (hidden,),
            "shared_head.norm": (hidden,),
        }
        own = {name: torch.randn(shape, dtype=vocab.dtype) for name, shape in shapes.items()}
    own |= {"embed_tokens": vocab.clone(), "shared_head.head": vocab.flip(0)}
    added = block | {f"{new}{name}.weight": value for name, value in own.items()}
    save_file(tensors | added, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}, indent=2))
    return added


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer: any text round-trips, at most 508 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=508,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the quick brown fox jumps over the lazy dog 0123456789 hello world"] * 10
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def weights_checksum(tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> str:
    """The Checksum of HF-named tensors, given as a state dict or as pairs."""
    checksum = Checksum()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        checksum.add(name, tensor)
    return checksum.hexdigest()
