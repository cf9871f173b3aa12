"""A tiny policy whose FP8 is emulated, and batches for it, for tests on one rank and on several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megasapo import config, metrics
from megasapo.types import TrainSequence

TOTAL_STEPS = 20


class Learner:
    """`Policy` on this rank, with packed or single sequences from a seed."""

    def __init__(self, path: Path, topo: Any, precision: dict[str, Any], *, pack: bool = True, **sections: Any) -> None:
        from megasapo.algo.settings import resolve
        from megasapo.mcore.policy import Policy

        values = {
            "model": {"path": str(path), "dtype": "float32"},
            "precision": precision,
            "optim": {"lr": 1e-3},
            "data": {"max_prompt_tokens": 32},
            "rollout": {"max_new_tokens": 64},
            "train": {"micro_batch_tokens": 96, "packing": pack},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        self.cfg = config.from_dict(values)
        self.topo = topo
        algo = resolve(self.cfg.algo, self.cfg.rollout)
        self.policy = Policy(self.cfg, topo, algo, temperature=1.0, total_steps=TOTAL_STEPS)

    def batch(self, rows: Sequence[TrainSequence], mini_batches: int = 1) -> Any:
        """The rows whose uid is this replica's, modulo dp."""
        from megasapo.algo.weights import token_weights
        from megasapo.mcore import exchange

        topo = self.topo
        own = [r for r in rows if topo.is_leader and r.uid % topo.dp == topo.dp_rank]
        rule = partial(token_weights, normalisation="sequence", constant_length=1)
        packing = exchange.PackingRule.of(self.cfg)
        return exchange.build_batch(
            own, topo, mini_batches=mini_batches, group_size=1, packing=packing, weight_rule=rule
        )

    def step(self, rows: Sequence[TrainSequence]) -> dict[str, float]:
        """An optimizer step; its statistics over all ranks."""
        counted = self.policy.update(self.policy.with_old_logprobs(self.batch(rows)))
        return metrics.scalars(metrics.merge(self.topo.gather(counted)))

    def logprobs(self, rows: Sequence[TrainSequence]) -> torch.Tensor | None:
        """Of the replica's micro-batches, one after another, on the last stage."""
        found = self.policy._logprobs(self.batch(rows).mini[0].micro)
        return torch.cat([f for f in found if f is not None]) if self.topo.is_last_stage else None

    def weights(self) -> list[dict[str, torch.Tensor]]:
        return self.policy.copy_weights()


def sequences(seed: int, count: int = 8, copies: int = 1) -> list[TrainSequence]:
    """Random ones; with `copies`, every one so many times in a row."""
    rng = np.random.default_rng(seed)
    rows: list[TrainSequence] = []
    for _ in range(count):
        n = int(rng.integers(8, 40))
        mask = np.arange(n) >= int(rng.integers(2, 6))
        logp = np.where(mask, -5.0, 0.0).astype(np.float32)
        tokens, advantage = rng.integers(0, 500, n).astype(np.int32), float(rng.normal())
        rows += [TrainSequence(len(rows) + i, tokens, mask, logp, advantage) for i in range(copies)]
    return rows
