"""`megasapo sft`: supervised cold start with the learner that reinforcement learning uses.

Reads demonstrations, trains on the mean negative log-likelihood of response tokens, writes an HF directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from megasapo import launch, run
from megasapo.config import Config, ConfigError
from megasapo.types import TrainSequence


def main(argv: list[str]) -> int:
    """Entry of the command; starts the ranks it needs and runs on each."""
    cfg, nproc = run.parse("sft", __doc__.splitlines()[0], argv)
    if cfg.sft.data is None:
        raise ConfigError("sft.data is required: JSONL or parquet with prompt (or messages) and response")
    code = run.on_ranks("sft", argv, nproc)
    if code is None:
        train(cfg)
    return code or 0


def train(cfg: Config) -> None:
    """Train for sft.epochs, resuming from the run's last checkpoint, and export."""
    from megasapo import metrics
    from megasapo.algo.settings import resolve
    from megasapo.algo.weights import token_weights
    from megasapo.data.sft import load_demonstrations
    from megasapo.data.tokenizer import load_tokenizer
    from megasapo.log.sinks import make_log
    from megasapo.mcore import checkpoint, exchange
    from megasapo.mcore.policy import Policy
    from megasapo.mcore.topology import Topology

    assert cfg.sft.data is not None  # main refuses it
    topo = Topology.init(cfg.parallel, seed=cfg.run.seed)
    try:
        stop = launch.stop_flag()
        directory = run.RunDir(cfg, is_main=topo.rank == 0)
        examples = load_demonstrations(cfg.sft.data, load_tokenizer(cfg.model.path), cfg.data, cfg.sft)
        steps = -(-len(examples) // cfg.sft.batch_size) * cfg.sft.epochs
        policy = Policy(cfg, topo, resolve(cfg.algo, cfg.rollout), temperature=1.0, total_steps=steps)
        last = checkpoint.latest(directory.path)
        step = policy.load(last)["step"] if last else 0
        log = make_log(cfg.log, directory.path, topo.rank == 0, resume_step=step if last else None, total_steps=steps)
        rule = partial(token_weights, normalisation="token", constant_length=1)
        phases = run.Phases()
        for rows in _batches(examples, cfg, start=step):
            with phases("update"):
                mine = [row for i, row in enumerate(rows) if i % topo.dp == topo.dp_rank] if topo.is_leader else []
                batch = exchange.build_batch(
                    mine,
                    topo,
                    mini_batches=1,
                    group_size=1,
                    max_tokens=cfg.train.micro_batch_tokens,
                    weight_rule=rule,
                )
                stats = metrics.merge(topo.gather(policy.update_supervised(batch.mini[0])))
            step += 1
            times, seconds = phases.take()
            tokens = sum(len(row.tokens) for row in rows)
            log(step, metrics.scalars(stats) | times | {"perf/tokens_per_s": tokens / seconds})
            ending = topo.any(stop() or directory.stop_requested())
            if ending or step % cfg.train.save_every == 0 or step == steps:
                policy.save(directory.path, step, {"step": step})
            if ending:
                break
        log.close()
        if step == steps:
            out = Path(cfg.sft.out) if cfg.sft.out else directory.path / "hf"
            policy.save_hf(out)
            directory.finish(step=step)
            if topo.rank == 0:
                run.report_end(
                    f"{directory.path} finished",
                    {"HF model": str(out), "metrics": str(directory.path / "metrics.jsonl")},
                )
    finally:
        topo.destroy()


def _batches(examples: list[TrainSequence], cfg: Config, start: int) -> Iterator[list[TrainSequence]]:
    """Batches of every epoch in a seeded order, from optimizer step `start` on; uids are unique over epochs."""
    from megasapo.data.prompts import epoch_order

    size = cfg.sft.batch_size
    per_epoch = -(-len(examples) // size)
    for step in range(start, per_epoch * cfg.sft.epochs):
        epoch, at = divmod(step, per_epoch)
        order: np.ndarray = epoch_order(len(examples), cfg.run.seed, epoch)
        yield [examples[i] for i in order[at * size : (at + 1) * size]]
