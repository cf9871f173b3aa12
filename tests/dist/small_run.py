"""A run without servers, which can be killed, continued and moved to another layout: a learner, its data, its checkpoints.

`python -m tests.dist.small_run JSON` takes optimizer steps until `until`, each on the sequences of its number, adds a
line with its metrics to `rows`, and saves. Its settings are those of `small_run.Task`.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megasapo import config, launch, lock
from megasapo.errors import UserError
from megasapo.types import TrainSequence

GROUPS, GROUP = 4, 2


@dataclass(frozen=True)
class Task:
    model: str
    run: str  # the run directory
    rows: str  # file of metrics, one JSON object a step
    until: int
    train: dict[str, Any] = field(default_factory=dict)  # of TrainConfig
    parallel: dict[str, int] = field(default_factory=dict)
    again: str = ""  # another run directory, for a checkpoint of what was loaded before any step
    largest_file: int = 0  # bytes, 0: any

    def arguments(self) -> str:
        return json.dumps(asdict(self))


def sequences(seed: int) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    rows = []
    for uid in range(GROUPS * GROUP):
        n = int(rng.integers(8, 24))
        mask = np.arange(n) >= 3
        logp = np.where(mask, -5.0, 0.0).astype(np.float32)
        rows.append(TrainSequence(uid, rng.integers(0, 500, n).astype(np.int32), mask, logp, float(rng.normal())))
    return rows


def read_rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(task: Task) -> None:
    from megasapo import jsonl
    from megasapo.mcore import checkpoint
    from megasapo.mcore.topology import Topology

    cfg = config.from_dict(
        {
            "model": {"path": task.model, "dtype": "float32"},
            "optim": {"lr": 1e-3, "schedule": "linear", "warmup_steps": 2},
            "parallel": task.parallel,
            "data": {"max_prompt_tokens": 8},
            "rollout": {"max_new_tokens": 16},
            "train": {"micro_batch_tokens": 64, **task.train},
        }
    )
    run, rows = Path(task.run), Path(task.rows)
    with lock.hold(run, launch.place()):
        topo = Topology.init(cfg.parallel)
        policy, train_step = make_learner(cfg, topo)
        last = checkpoint.find(run, topo, verify=cfg.train.verify_checkpoints)
        step = policy.load(last)["step"] if last else 0
        if task.again:
            policy.save(Path(task.again), {"step": step})
            policy.finish_saving()
        if topo.rank == 0:
            jsonl.keep(rows, lambda row: row["step"] <= step)
            rows.with_suffix(".began").write_text(str(step))
        if task.largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (task.largest_file, task.largest_file))
        while step < task.until and not topo.any(policy.saving_failed):
            row = train_step(step)
            step += 1
            if topo.rank == 0:
                jsonl.append(rows, [{"step": step, **row}])
            if step % cfg.train.save_every == 0:
                policy.save(run, {"step": step})
        policy.finish_saving()
        topo.destroy()


def make_learner(cfg: config.Config, topo: Any) -> tuple[Any, Callable[[int], dict[str, float]]]:
    """A policy, and what takes its optimizer steps on the data of a number."""
    from megasapo import metrics
    from megasapo.algo.settings import resolve
    from megasapo.algo.weights import token_weights
    from megasapo.mcore import exchange
    from megasapo.mcore.policy import Policy

    policy = Policy(cfg, topo, resolve(cfg.algo, cfg.rollout), temperature=0.8, total_steps=1000)
    rule = partial(token_weights, normalisation="sequence", constant_length=1)

    def train_step(number: int) -> dict[str, float]:
        mine = [r for r in sequences(number) if topo.is_leader and r.uid % topo.dp == topo.dp_rank]
        packing = exchange.PackingRule.of(cfg)
        batch = exchange.build_batch(
            mine, topo, mini_batches=2, group_size=GROUP, packing=packing, weight_rule=rule
        )
        return metrics.scalars(metrics.merge(topo.gather(policy.update(policy.with_old_logprobs(batch)))))

    return policy, train_step


if __name__ == "__main__":
    try:
        main(Task(**json.loads(sys.argv[1])))
    except UserError as e:
        print(f"error: {e}", flush=True)
        sys.exit(2)
