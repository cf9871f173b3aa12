"""`megasapo sft`: supervised cold start with the learner that reinforcement learning uses.

Reads demonstrations, trains on the mean negative log-likelihood of response tokens, writes an HF directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megasapo import launch, run
from megasapo.config import Config, ConfigError
from megasapo.layout import slots_for
from megasapo.placed import refuse_unwritable_directory
from megasapo.types import TrainSequence

if TYPE_CHECKING:
    from megasapo.log.heartbeat import Heartbeat
    from megasapo.log.sinks import Log
    from megasapo.mcore.policy import Policy
    from megasapo.mcore.topology import Topology
    from megasapo.meter import Meter


def main(argv: list[str]) -> int:
    """Entry of the command; starts the ranks it needs and runs on each."""
    cfg, nproc = run.parse("sft", "Supervised cold start with the learner of `megasapo train`.", argv)
    if cfg.sft.data is None:
        raise ConfigError("sft.data is required: JSONL or parquet with prompt (or messages) and response")
    slots = slots_for(cfg.sft.max_tokens, cfg.parallel.cp)
    if slots > cfg.train.micro_batch_tokens:
        raise ConfigError(
            f"sft.max_tokens={cfg.sft.max_tokens} takes {slots} slots (parallel.cp={cfg.parallel.cp}), more than "
            f"train.micro_batch_tokens={cfg.train.micro_batch_tokens}: lower the first or raise the second"
        )
    if cfg.train.profile is not None:
        raise ConfigError("train.profile is for `megasapo train`, and would do nothing here: remove it")
    if cfg.sft.out is not None:
        _check_out(Path(cfg.sft.out))
    run.refuse_other_command("sft", cfg)
    code = run.on_ranks("sft", argv, nproc, [cfg.parallel], cfg.run_dir)
    if code is None:
        train(cfg)
    return code or 0


def _check_out(out: Path) -> None:
    """Refuse now what could not be written at the end."""
    if out.exists() and not (out / "config.json").is_file():
        raise ConfigError(f"sft.out={out}: exists and is not an HF directory, which alone is replaced: name another")
    refuse_unwritable_directory(out.absolute().parent, f"sft.out={out}")


def train(cfg: Config) -> None:
    """Train for sft.epochs, resuming from the run's last checkpoint, and export."""
    from megasapo.algo.settings import resolve
    from megasapo.data.sft import load_demonstrations
    from megasapo.data.tokenizer import load_tokenizer
    from megasapo.log.sinks import make_log
    from megasapo.mcore import checkpoint
    from megasapo.mcore.policy import Policy
    from megasapo.meter import Meter

    assert cfg.sft.data is not None  # main refuses it
    with ExitStack() as cleanup:
        topo, heartbeat, directory = run.join(cfg, cleanup)
        examples = load_demonstrations(cfg.sft.data, load_tokenizer(cfg.model.path), cfg.data, cfg.sft)
        steps = -(-len(examples) // cfg.sft.batch_size) * cfg.sft.epochs
        algo = replace(resolve(cfg.algo, cfg.rollout), kl_coef=0.0)  # no reference model is needed here
        policy = Policy(cfg, topo, algo, temperature=1.0, total_steps=steps)
        cleanup.callback(policy.close)
        if topo.rank == 0:
            print(*policy.summary(), sep="\n", flush=True)
        last = checkpoint.find(directory.path, topo, verify=cfg.train.verify_checkpoints)
        step = policy.load(last)["step"] if last else 0
        directory.resumed(last, finished=step >= steps)
        log = make_log(cfg.log, directory.path, topo.rank == 0, resume_step=step if last else None, total_steps=steps)
        cleanup.callback(log.close)
        meter = Meter.start(cfg, topo, old_logprobs=False, reference=False)
        cleanup.callback(meter.close)
        launch.freeze_heap()
        step = _loop(cfg, topo, policy, examples, directory, log, meter, heartbeat, step, steps)
        with heartbeat.phase("save"):
            policy.finish_saving()
        out = Path(cfg.sft.out) if cfg.sft.out else directory.path / "hf"
        if step >= steps:
            policy.save_hf(out)
            directory.finish("sft", step)
    directory.report_end(step, steps, out)


def _loop(
    cfg: Config,
    topo: Topology,
    policy: Policy,
    examples: list[TrainSequence],
    directory: run.RunDir,
    log: Log,
    meter: Meter,
    heartbeat: Heartbeat,
    step: int,
    steps: int,
) -> int:
    """From `step` to `steps`, or until asked to stop; returns the step reached. Collective."""
    from megasapo import metrics
    from megasapo.algo.weights import token_weights
    from megasapo.mcore.exchange import PackingRule, build_batch

    phases, packing = run.Phases(heartbeat.phase), PackingRule.of(cfg)
    for rows in _batches(examples, cfg, start=step):
        heartbeat.at(step + 1, steps)
        with phases("batch"):
            mine = rows[topo.dp_rank :: topo.dp] if topo.is_leader else []
            batch = build_batch(
                mine,
                topo,
                mini_batches=1,
                group_size=1,
                packing=packing,
                weight_rule=partial(token_weights, normalisation="token", constant_length=1),
            )
        with phases("update"):
            learned = policy.update_supervised(batch.mini[0])
        stats = metrics.merge(topo.gather(metrics.merge([learned, meter.take(batch)])))
        step += 1
        numbers = metrics.scalars(stats) | phases.take()
        log(step, numbers | meter.rates(numbers, sum(len(row.tokens) for row in rows)))
        ending = topo.any(directory.stop_requested() or policy.saving_failed)
        if ending or step % cfg.train.save_every == 0 or step == steps:
            with heartbeat.phase("save"):
                policy.save(directory.path, {"command": "sft", "step": step})
        if ending:
            break
    return step


def _batches(examples: list[TrainSequence], cfg: Config, start: int) -> Iterator[list[TrainSequence]]:
    """Batches of every epoch in a seeded order, from optimizer step `start` on."""
    from megasapo.data.prompts import epoch_order

    size = cfg.sft.batch_size
    per_epoch = -(-len(examples) // size)
    for step in range(start, per_epoch * cfg.sft.epochs):
        epoch, at = divmod(step, per_epoch)
        order: np.ndarray = epoch_order(len(examples), cfg.run.seed, epoch)
        yield [examples[i] for i in order[at * size : (at + 1) * size]]
