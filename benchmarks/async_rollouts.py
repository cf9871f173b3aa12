"""One-step-off rollouts (rollout.max_staleness=1) against synchronous ones, on the arithmetic example.

Whole runs of examples/arithmetic/sapo.yaml from its cold start (`make train` makes it), --seeds of each kind, taking
turns so that a busy machine slows both. Requests mix freely in both (rollout.deterministic=false).

Learner and server share this machine's cores: what is gained is the time in which one of them waits. Servers on other
hardware, which is what one step off is for, are not measured.

    python -m benchmarks.async_rollouts [--steps 60] [--seeds 3] [--nproc 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import measure

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "arithmetic"
KINDS = {
    "synchronous": ("rollout.deterministic=false",),
    "one step off": ("rollout.deterministic=false", "rollout.max_staleness=1"),
}
LAST = 10  # steps that the final reward is the mean of


def run(kind: str, seed: int, directory: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """The metrics of a run's steps."""
    name = f"{list(KINDS).index(kind)}-{seed}"
    settings = [
        *(f"run.name={name}", f"run.dir={directory}", f"run.seed={seed}", *KINDS[kind]),
        *(f"model.path={args.task / 'cold-start'}", f"data.train={args.task / 'train.jsonl'}", "data.eval=null"),
        *(f"train.steps={args.steps}", f"train.save_every={args.steps}", "train.eval_every=0", "parallel.ep=1"),
        *("log.sinks=[jsonl]", "log.keep_rollouts=false"),
    ]
    command = [sys.executable, "-m", "megasapo.cli", "train", str(EXAMPLE / "sapo.yaml"), *settings]
    with (directory / f"{name}.log").open("w") as log:
        code = subprocess.run([*command, "--nproc", str(args.nproc)], stdout=log, stderr=log, cwd=ROOT).returncode
    if code:
        sys.exit(f"{kind}, seed {seed}: exit code {code}:\n{(directory / f'{name}.log').read_text()[-3000:]}")
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


def step_s(row: dict[str, float]) -> float:
    return row["time/step_s"]


def final_reward(rows: list[dict[str, float]]) -> float:
    return statistics.mean(row["reward/mean"] for row in rows[-LAST:])


def table_rows(seen: dict[str, list[list[dict[str, float]]]]) -> list[tuple[str, ...]]:
    """A row for each kind: reward of every seed, mean and standard deviation, seconds a step, ratio to synchronous."""
    clock = {kind: [statistics.median(map(step_s, rows[2:])) for rows in runs] for kind, runs in seen.items()}
    found = []
    for kind, runs in seen.items():
        rewards = [final_reward(rows) for rows in runs]
        waits = statistics.median(statistics.median(r["time/rollout_s"] for r in rows[2:]) for rows in runs)
        ratio = statistics.median(s / own for s, own in zip(clock["synchronous"], clock[kind], strict=True))
        stale = statistics.mean(row["staleness/mean"] for rows in runs for row in rows)
        found.append((
            kind, ", ".join(f"{r:.3f}" for r in rewards), f"{statistics.mean(rewards):.3f}",
            f"{statistics.stdev(rewards):.3f}", f"{stale:.2f}", f"{statistics.median(clock[kind]):.2f}",
            f"{waits:.2f}", f"{ratio:.2f}",
        ))  # fmt: skip
    return found


HEADER = (
    "rollouts", f"reward of the last {LAST} steps, by seed", "mean", "std", "staleness", "s a step (median)",
    "of it waiting for rollouts", "speed-up over synchronous",
)  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", type=Path, default=EXAMPLE / "out", help="the example's directory, with cold-start/")
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--nproc", type=int, default=1)
    args = p.parse_args()
    args.task = args.task.resolve()
    if not (args.task / "cold-start" / "config.json").exists():
        p.error(f"{args.task} has no cold-start/: `make train` makes it, or give --task")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seen: dict[str, list[list[dict[str, float]]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(1, 1 + args.seeds):
            for kind, runs in seen.items():
                runs.append(run(kind, seed, Path(directory), args))
                print(f"{kind}, seed {seed}: {final_reward(runs[-1]):.3f}", file=sys.stderr, flush=True)
    print(measure.machine("megatron-core"))
    print(f"{args.steps} steps, {args.nproc} rank(s)\n")
    print(measure.table(HEADER, table_rows(seen)))


if __name__ == "__main__":
    main()
