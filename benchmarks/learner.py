"""megasapo's learner on the batch of learner_work.py: the step that several benchmarks take."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.learner_work import BETAS, CLIP, EPS, GROUP, LR, MINI_BATCHES, Work
from megasapo.algo.settings import resolve
from megasapo.algo.weights import token_weights
from megasapo.config import from_dict
from megasapo.mcore.exchange import PackingRule, build_batch
from megasapo.mcore.policy import Policy
from megasapo.mcore.topology import Topology
from megasapo.types import Batch, TrainSequence


class Learner:
    """One policy, and what train.py does with a batch: packing and placing it, old logprobs, an update."""

    def __init__(self, work: Work, topo: Topology, **sections: dict[str, Any]) -> None:
        """`sections`: settings beside those of the batch, by section of the configuration."""
        prompt, response = work.longest
        settings: dict[str, dict[str, Any]] = {
            "model": {"path": work.model, "dtype": work.dtype},
            "data": {"max_prompt_tokens": prompt},
            "rollout": {"max_new_tokens": response, "group_size": GROUP},
            "algo": {"mini_batches": MINI_BATCHES},
            "optim": {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "clip_grad": CLIP},
            "train": {"micro_batch_tokens": work.micro_batch_tokens},
        }
        for name, more in sections.items():
            settings[name] = settings.get(name, {}) | more
        cfg = from_dict(settings)
        self._topo, self._mini_batches = topo, cfg.algo.mini_batches
        self._packing = PackingRule(work.micro_batch_tokens)
        self._rule = partial(token_weights, normalisation="sequence", constant_length=response)
        self.policy = Policy(cfg, topo, resolve(cfg.algo, cfg.rollout), temperature=1.0, total_steps=1000)

    def batch(self, rows: list[TrainSequence]) -> Batch:
        return build_batch(
            rows,
            self._topo,
            mini_batches=self._mini_batches,
            group_size=1,
            packing=self._packing,
            weight_rule=self._rule,
            routing=None if rows[0].routing is None else self.policy.routing_layout,
        )

    def step(self, rows: list[TrainSequence], *, first: bool = False) -> None:
        """`first`: old logprobs of the first mini-batch too, which its update would find by itself."""
        self.policy.update(self.policy.with_old_logprobs(self.batch(rows), first=first))


def sequences(work: Work, order: Iterable[int] | None = None) -> list[TrainSequence]:
    """In that order, by which they are split into mini-batches; uids count them in it."""
    advantages = work.advantages()
    rows = []
    for uid, i in enumerate(range(len(work.prompts)) if order is None else order):
        tokens = np.array(work.prompts[i] + work.responses[i], dtype=np.int32)
        mask = np.arange(len(tokens)) >= len(work.prompts[i])
        rows.append(TrainSequence(uid, tokens, mask, np.zeros(len(tokens), np.float32), float(advantages[i])))
    return rows
