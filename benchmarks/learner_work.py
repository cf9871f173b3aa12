"""What both sides of learner_step.py and rl_step.py are given: the batch, the model's shape and what it costs.

No peer and no megatron-core here: the processes that import this have one of the two.
"""

from __future__ import annotations

import argparse
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

GROUP, MINI_BATCHES = 8, 2
LR, BETAS, EPS, CLIP = 1e-6, (0.9, 0.95), 1e-8, 1.0


@dataclass(frozen=True)
class Work:
    """One batch and how it is learned from."""

    model: str
    dtype: str
    prompts: list[list[int]]  # of each sequence
    responses: list[list[int]]
    rewards: list[float]
    micro_batch_tokens: int  # ours, packed
    micro_batch_sequences: int  # TRL's, padded

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        return len(self.prompts) * (max(map(len, self.prompts)) + max(map(len, self.responses)))

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts, self.responses, strict=True)]

    @property
    def longest(self) -> tuple[int, int]:
        return max(map(len, self.prompts)), max(map(len, self.responses))

    def advantages(self) -> np.ndarray:
        """As TRL makes them: the unbiased standard deviation of the group, plus 1e-4."""
        groups = np.asarray(self.rewards, dtype=np.float32).reshape(-1, GROUP)
        centred = groups - groups.mean(1, keepdims=True)
        return (centred / (groups.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)


def response_lengths(kind: str, sequences: int, mean: int, rng: np.random.Generator) -> list[int]:
    if kind == "equal":
        return [mean] * sequences
    quantiles = (np.arange(sequences) + 0.5) / sequences
    lengths = np.clip(-np.log1p(-quantiles) * mean, 4, 4 * mean).astype(int)
    return rng.permutation(lengths).tolist()


def make_work(kind: str, model: Path, args: argparse.Namespace) -> Work:
    rng = np.random.default_rng(0)
    lengths = response_lengths(kind, args.sequences, args.mean_response, rng)
    prompts = [rng.integers(3, args.vocab, args.prompt).tolist() for _ in range(args.sequences // GROUP)]
    return Work(
        model=str(model),
        dtype=args.dtype,
        prompts=[p for p in prompts for _ in range(GROUP)],
        responses=[rng.integers(3, args.vocab, n).tolist() for n in lengths],
        rewards=rng.normal(size=args.sequences).tolist(),
        micro_batch_tokens=max(args.micro_batch_tokens, args.prompt + max(lengths)),
        micro_batch_sequences=args.trl_micro_batch or args.sequences // MINI_BATCHES,
    )


def add_model_options(p: argparse.ArgumentParser, vocab: int) -> None:
    defaults = {"layers": 4, "experts": 8, "hidden": 256, "moe-intermediate": 384, "vocab": vocab}
    for name, default in defaults.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")


def add_work_options(p: argparse.ArgumentParser, runs: int) -> None:
    """Of `make_work`, and how it is run."""
    defaults = {
        "sequences": 16, "prompt": 32, "mean-response": 96, "micro-batch-tokens": 4096, "threads": 1, "runs": runs,
    }  # fmt: skip
    for name, default in defaults.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.set_defaults(trl_micro_batch=None)


def model_shape(args: argparse.Namespace) -> dict[str, Any]:
    """Proportions of Qwen3-30B-A3B: heads twice as wide as the hidden states, experts in use three times."""
    return {
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_experts": args.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": args.moe_intermediate,
        "num_attention_heads": args.hidden // 32,
        "num_key_value_heads": max(1, args.hidden // 128),
        "head_dim": 64,
        "vocab_size": args.vocab,
    }


def peak_memory_mib() -> float:
    """Peak of this process so far: device memory of tensors on CUDA, else resident memory; MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
