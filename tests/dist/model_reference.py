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
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(parameter.grad):
                gate, up = both.chunk(2)
                stem = name.removesuffix("gate_up_proj") + str(expert)
                gradients |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif name.endswith("mlp.experts.down_proj"):
            stem = name.removesuffix("down_proj")
            gradients |= {f"{stem}{e}.down_proj.weight": g for e, g in enumerate(parameter.grad)}
        else:
            gradients[name] = parameter.grad
    return logps, entropies, gradients
