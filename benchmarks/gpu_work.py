"""What gpu.py measures with: a slice of a model without files of weights, a policy's step on one pack, clocks.

Times are the device's, by CUDA events; on a CPU, where only the script itself is tried out, the clock's.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from megasapo.algo.settings import resolve
from megasapo.algo.weights import token_weights
from megasapo.config import from_dict
from megasapo.geometry import read_config
from megasapo.mcore import bridge
from megasapo.mcore.exchange import PackingRule, build_batch
from megasapo.mcore.policy import Policy
from megasapo.mcore.topology import Topology
from megasapo.types import Batch, TrainSequence

# Qwen3-30B-A3B, of whose 48 layers there are 4
QWEN3 = Path(__file__).resolve().parents[1] / "examples" / "qwen3_30b_a3b" / "geometry"
SLICE: dict[str, Any] = read_config(QWEN3) | {"num_hidden_layers": 4}
TINY = SLICE | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size": 512,
}
SHARES = (16, 12, 10, 8, 6, 4, 4, 2, 2)  # of the pack's 64 parts, that each sequence takes


@dataclass(frozen=True)
class Work:
    """The model's directory (config.json alone), the pack, and how often things are measured."""

    model: Path
    tokens: int
    runs: int
    warm_up: int
    overrides: dict[str, Any]  # of TransformerConfig

    @property
    def lengths(self) -> list[int]:
        return [share * self.tokens // 64 for share in SHARES]

    def sequences(self) -> list[TrainSequence]:
        """Random tokens; all but each first one in the loss, so that the head computes every slot of the pack."""
        random = np.random.default_rng(0)
        vocab = json.loads((self.model / "config.json").read_text())["vocab_size"]
        rows = []
        for uid, slots in enumerate(self.lengths):
            n = slots + 1
            ids = random.integers(0, vocab, n).astype(np.int32)
            logp = np.zeros(n, np.float32)
            rows.append(TrainSequence(uid, ids, np.arange(n) > 0, logp, float(random.normal())))
        return rows


def write_model(directory: Path, shape: dict[str, Any]) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape))
    return directory


class Learner:
    """A policy with megatron-core's own random weights, and a batch of one pack."""

    def __init__(self, work: Work, topo: Topology, *, recipe: str = "bf16", replay: str = "none") -> None:
        cfg = from_dict({
            "model": {
                "path": str(work.model),
                "dtype": "bfloat16",
                "override_transformer_config": work.overrides,
            },
            "precision": {"recipe": recipe},
            "data": {"max_prompt_tokens": 1},
            "rollout": {"max_new_tokens": work.tokens - 1},
            "algo": {"routing_replay": replay},
            "optim": {"lr": 1e-6},
            "train": {"micro_batch_tokens": work.tokens},
        })  # fmt: skip
        with patch.object(bridge, "load_hf", lambda *_: None):
            algo = resolve(cfg.algo, cfg.rollout)
            self.policy = Policy(cfg, topo, algo, temperature=1.0, total_steps=1000)
        outside: Any = self.policy._chunks[0].outside
        rows = outside.precision.cfg.rows
        self.batch: Batch = build_batch(
            work.sequences(),
            replace(topo, rows=rows) if rows > 1 else topo,
            mini_batches=1,
            group_size=1,
            packing=PackingRule(work.tokens),
            weight_rule=partial(token_weights, normalisation="sequence", constant_length=1),
        )
        packs = [mb.tokens.numel() for mini in self.batch.mini for mb in mini.micro]
        assert packs == [work.tokens], f"one pack of {work.tokens} tokens was wanted, not {packs}"

    def step(self) -> None:
        self.policy.update(self.batch)


@contextmanager
def learner(work: Work, topo: Topology, **settings: Any) -> Iterator[Learner]:
    """A Learner whose memory is free again afterwards."""
    made = Learner(work, topo, **settings)
    try:
        yield made
    finally:
        made.__dict__.clear()
        free()


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


class Clock:
    """Seconds between `start` and `stop`, which may be far from where they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._seconds = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def _mark(self, which: int) -> None:
        if self._events is not None:
            self._events[which].record()
        self._seconds[which] = time.perf_counter()

    def seconds(self) -> float:
        if self._events is None:
            return self._seconds[1] - self._seconds[0]
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


def median_seconds(run: Callable[[], object], work: Work, device: torch.device) -> float:
    return medians({"": run}, work, device)[""]


def medians(runs: dict[str, Callable[[], object]], work: Work, device: torch.device) -> dict[str, float]:
    """Median seconds of each of `runs`, which take turns."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(work.warm_up + work.runs):
        for name, run in runs.items():
            clock = Clock(device)
            clock.start()
            run()
            clock.stop()
            if number >= work.warm_up:
                seen[name].append(clock.seconds())
    return {name: statistics.median(seconds) for name, seconds in seen.items()}


@contextmanager
def timed_calls(owner: Any, name: str, device: torch.device) -> Iterator[list[Clock]]:
    """Clocks of the calls that a method gets inside."""
    clocks: list[Clock] = []
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        clocks.append(Clock(device))
        clocks[-1].start()
        out = original(*args, **kwargs)
        clocks[-1].stop()
        return out

    with patch.object(owner, name, timed):
        yield clocks
