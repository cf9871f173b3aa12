"""`megasapo train`: the loop. Rollouts, SAPO on the learner, weights to the servers, and everything restartable.

Start reading at `loop`. All setup is in `train`; every collective call is made by all ranks in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from megasapo import launch, run
from megasapo.config import Config, ConfigError
from megasapo.types import Batch, Group, TrainSequence

if TYPE_CHECKING:
    from megasapo.log import Log
    from megasapo.mcore.policy import Policy
    from megasapo.mcore.topology import Topology
    from megasapo.rollout.source import RolloutSource


def main(argv: list[str]) -> int:
    """Entry of the command; starts the ranks it needs and runs on each."""
    cfg, nproc = run.parse("train", __doc__.splitlines()[0], argv)
    if cfg.data.train is None:
        raise ConfigError("data.train is required: JSONL or parquet with prompt (or messages) and answer")
    if (cfg.run_dir / "done").exists():
        print(f"{cfg.run_dir} has finished ({(cfg.run_dir / 'done').read_text()}); choose another run.name, or remove it")
        return 0
    code = run.on_ranks("train", argv, nproc)
    if code is None:
        train(cfg)
    return code or 0


@dataclass(frozen=True)
class Parts:
    """What the loop works with, made once."""

    cfg: Config
    topo: Topology
    policy: Policy
    source: RolloutSource
    publish: Callable[[int], None]
    evaluate: Callable[[], dict[str, float]]
    log: Callable[..., None]
    directory: run.RunDir
    stop: Callable[[], bool]


def loop(p: Parts, step: int) -> int:
    """From `step` to train.steps, or until asked to stop; returns the step reached. Collective."""
    from megasapo import metrics
    from megasapo.rollout.stats import group_stats

    phases = run.Phases()
    p.publish(step)
    while step < p.cfg.train.steps:
        with phases("rollout"):
            groups, dropped = p.source.next(version=step)
        with phases("batch"):
            batch = make_batch(groups, p.cfg, p.topo)
        with phases("old_logprobs"):
            batch = p.policy.with_old_logprobs(batch)
        with phases("update"):
            learned = p.policy.update(batch)
        sampled = group_stats(groups, step, dropped)
        step += 1
        with phases("publish"):
            p.publish(step)
        with phases("evaluate"):
            held_out = p.evaluate() if _every(p.cfg.train.eval_every, step) else {}
        stats = metrics.merge(p.topo.gather(metrics.merge([sampled, learned])))
        p.log(step, stats, groups, held_out, *phases.take())
        ending = p.topo.any(p.stop() or p.directory.stop_requested())
        if ending or step == p.cfg.train.steps or _every(p.cfg.train.save_every, step):
            with phases("save"):  # after the line of this step is on disk: a kill in between loses neither
                p.policy.save(p.directory.path, step, {"step": step, "source": p.source.state()})
        if ending:
            break
    return step


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def make_batch(groups: list[Group], cfg: Config, topo: Topology) -> Batch:
    """Advantages, token weights, mini-batches balanced over ranks, packed. Collective."""
    from megasapo.algo.settings import resolve
    from megasapo.algo.weights import token_weights
    from megasapo.mcore.exchange import build_batch

    algo = resolve(cfg.algo, cfg.rollout)
    return build_batch(
        to_sequences(groups, algo),
        topo,
        mini_batches=cfg.algo.mini_batches,
        group_size=cfg.rollout.group_size,
        max_tokens=cfg.train.micro_batch_tokens,
        weight_rule=partial(token_weights, normalisation=algo.normalisation, constant_length=algo.constant_length),
    )
