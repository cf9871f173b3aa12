"""What transformers says of a model: greedy tokens, logprobs and experts, for the contract tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch


@cache
def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@cache
def greedy_of(directory: Path, prompt: tuple[int, ...]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = load(directory).generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=None)
    return tuple(out[0, len(prompt) :].tolist())


def logprobs_of(
    directory: Path, prompt: tuple[int, ...], output: tuple[int, ...], temperature: float = 1.0
) -> np.ndarray:
    """[R] teacher-forced."""
    ids = torch.tensor([prompt + output])
    with torch.no_grad():
        logp = torch.log_softmax(load(directory)(ids).logits[0] / temperature, dim=-1)
    return logp[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def routing_of(directory: Path, prompt: tuple[int, ...], output: tuple[int, ...]) -> np.ndarray:
    """[P + R - 1, L, K], descending weight."""
    ids = torch.tensor([(prompt + output)[:-1]])
    with torch.no_grad():
        logits = load(directory)(ids, output_router_logits=True).router_logits
    return torch.stack([layer.topk(2, dim=-1).indices for layer in logits], dim=1).numpy()
