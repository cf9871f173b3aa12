"""What emulating FP8 costs a learner step, for each recipe on a random Qwen3-MoE. Real FP8 is not run here.

One process and thread; all learners have the same weights and take turns on the same batch: old logprobs and SAPO
update. Response lengths are exponential quantiles, as in learner_step.py.

    python -m benchmarks.fp8_emulation [--dtype float32] [--hidden 256] [--runs 3]
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from benchmarks.learner_work import GROUP, Work, add_model_options, make_work, model_shape
from tests.tiny import make_model

RECIPES = ("none", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8")


class Learner:
    """One recipe's policy on the batch."""

    def __init__(self, recipe: str, work: Work, topo: Any) -> None:
        from megasapo.algo.settings import resolve
        from megasapo.config import from_dict
        from megasapo.mcore.policy import Policy

        prompt, response = work.longest
        cfg = from_dict({
            "model": {"path": work.model, "dtype": work.dtype},
            "precision": {} if recipe == "none" else {"recipe": recipe, "emulate": True},
            "data": {"max_prompt_tokens": prompt},
            "rollout": {"max_new_tokens": response, "group_size": GROUP},
            "train": {"micro_batch_tokens": work.micro_batch_tokens},
        })  # fmt: skip
        self._work, self._topo = work, topo
        self._policy = Policy(cfg, topo, resolve(cfg.algo, cfg.rollout), temperature=1.0, total_steps=1000)

    def learn(self) -> None:
        self._policy.update(self._policy.with_old_logprobs(self._batch(), first=True))

    def _batch(self) -> Any:
        from megasapo.algo.weights import token_weights
        from megasapo.mcore.exchange import PackingRule, build_batch
        from megasapo.types import TrainSequence

        work, rows = self._work, []
        for uid, (prompt, response) in enumerate(zip(work.prompts, work.responses, strict=True)):
            tokens = np.array(prompt + response, dtype=np.int32)
            mask = np.arange(len(tokens)) >= len(prompt)
            own = float(work.advantages()[uid])
            rows.append(TrainSequence(uid, tokens, mask, np.zeros(len(tokens), np.float32), own))
        rule = partial(token_weights, normalisation="sequence", constant_length=1)
        packing = PackingRule(work.micro_batch_tokens)
        return build_batch(rows, self._topo, mini_batches=1, group_size=GROUP, packing=packing, weight_rule=rule)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p, vocab=4096)
    defaults = {"sequences": 16, "prompt": 32, "mean-response": 96, "micro-batch-tokens": 4096, "runs": 3}
    for name, default in defaults.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.set_defaults(trl_micro_batch=1)
    args = p.parse_args()
    torch.set_num_threads(1)
    from megasapo.mcore.topology import Topology
    from megasapo.sections import ParallelConfig

    with tempfile.TemporaryDirectory() as directory:
        work = make_work("long tail", make_model(Path(directory) / "model", **model_shape(args)), args)
        topo = Topology.init(ParallelConfig())
        learners = {recipe: Learner(recipe, work, topo) for recipe in RECIPES}
        turns = {name: partial(measure.timed, learner.learn) for name, learner in learners.items()}
        seen = measure.alternate(turns, args.runs)
        topo.destroy()
    rows = []
    for recipe in RECIPES:
        middle, times = measure.median(seen[recipe]), measure.ratio(seen[recipe], seen["none"])
        rows.append((recipe, f"{middle.clock:.2f}", f"{middle.cpu:.2f}", f"{times.cpu:.2f}"))
    print(measure.machine("megatron-core"))
    print(f"Qwen3-MoE {model_shape(args)}, {args.dtype}; {work.tokens} tokens; medians of {args.runs} turns\n")
    print(measure.table(("recipe", "seconds", "CPU s", "CPU / none's"), rows))


if __name__ == "__main__":
    main()
