"""What the learner's model must compute, from transformers: token logprobs, entropies and gradients of tiny models.

`SEQUENCES` and the weights are the same for every layout; `test_model.py` compares the ranks' results with `reference`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny import make_model

MODELS: dict[str, dict[str, Any]] = {
    "moe": {"kind": "moe", "vocab_size": 515},  # padded for tp 2
    "moe_tied": {
        "kind": "moe",
        "vocab_size": 515,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "num_attention_heads": 8,
    },
    "dense": {"kind": "dense", "rope_theta": 1e4, "rms_norm_eps": 1e-5},
    "qwen2_moe": {"kind": "qwen2_moe", "vocab_size": 515},
    "mixtral": {"kind": "mixtral"},
    "glm4_moe": {"kind": "glm4_moe"},
    "deepseek_v3": {"kind": "deepseek_v3", "vocab_size": 515},
    "deepseek_v3_plain": {  # queries without a latent, no groups of experts, no YaRN, another eps than latents' norms
        "kind": "deepseek_v3",
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rms_norm_eps": 1e-5,
    },
    "gpt_oss": {"kind": "gpt_oss", "vocab_size": 515},
}
LENGTHS = (5, 17, 33, 2, 64, 9, 30, 12)
TEMPERATURE = 0.7
ENTROPY_WEIGHT = 0.3


def sequences() -> list[np.ndarray]:
    random = np.random.default_rng(7)
    return [random.integers(0, 512, n).astype(np.int32) for n in LENGTHS]


def token_weights() -> list[float]:
    """One for each sequence; the loss is the sum over tokens of weight * (logp + ENTROPY_WEIGHT * entropy)."""
    return [0.1 * (i + 1) for i in range(len(LENGTHS))]


def make_models(directory: Path) -> None:
    for name, over in MODELS.items():
        make_model(directory / name, **over)


def reference(model_dir: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, torch.Tensor]]:
    """Logprobs and entropies of each sequence ([n - 1] each), and the gradient of the loss by HF name."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    logps, entropies = [], []
    loss = torch.zeros(())
    for ids, weight in zip(sequences(), token_weights(), strict=True):
        tokens = torch.from_numpy(ids).long()
        log_probs = torch.log_softmax(model(tokens[None]).logits[0, :-1] / TEMPERATURE, dim=-1)
        logp = log_probs.gather(1, tokens[1:, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        loss = loss + weight * (logp + ENTROPY_WEIGHT * entropy).sum()
        logps.append(logp.detach())
        entropies.append(entropy.detach())
    loss.backward()
    # transformers keeps the experts of a layer in one tensor; on disk, and here, each has its own
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    # routers' biases have no gradient: they leave the learner as they came
    biases = {name: value for name, value in model.state_dict().items() if name.endswith("e_score_correction_bias")}
    return logps, entropies, revert_weight_conversion(model, gradients | biases)
