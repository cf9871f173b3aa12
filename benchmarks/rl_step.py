"""A whole RL step, from prompts to new weights in the sampler, of megasapo and of TRL's GRPOTrainer.

The same Qwen3-MoE, prompts, group size, response limit, reward (a regular expression), SAPO settings and one optimizer
step a batch. megasapo runs its own training loop: embedded server in a process of its own, reward, old logprobs,
update, weights published to the server, metrics and samples logged. TRL generates with transformers' `generate` on the
model that it trains, and, as it does by default when batch and optimizer step coincide, computes no old logprobs;
megasapo does. The server waits while the learner works and the other way round, so that both sides use the same number
of threads at a time.

Responses end at the end-of-sequence tokens or the limit, on both sides by the same rule. The output
weight is scaled down until every token is about as likely as any other, so that an end comes at a known rate. "long
tail": ids are declared end tokens until their share of the vocabulary is 1 in --mean-response: geometric lengths, which
differ from run to run, under a limit of 8 times their mean; "to the limit": twice the mean, and only the tokenizer's
own end token, 1 in the vocabulary: nothing is padded, no sequence ends before another.
Each side has processes of its own; the two take turns, a whole step each, after one step that does not count.

    python -m benchmarks.rl_step [--quick] [--prompts 4] [--max-new-tokens 192] [--mean-response 24] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks import measure
from benchmarks.learner_work import (
    BETAS,
    CLIP,
    EPS,
    GROUP,
    LR,
    add_model_options,
    model_shape,
    peak_memory_mib,
)
from benchmarks.measure import Seconds
from benchmarks.turns import Message, Turns, sides
from tests.tiny import make_model

PATTERN = "[0-9]"  # rewarded: a digit somewhere in the response


@dataclass(frozen=True)
class Task:
    model: str
    data: str  # JSONL
    dtype: str
    prompts: int
    max_prompt_tokens: int
    max_new_tokens: int
    end_tokens: list[int]  # beside the tokenizer's own
    threads: int


def make_task(kind: str, model: Path, data: Path, args: argparse.Namespace) -> Task:
    long_tail = kind == "long tail"
    number = args.vocab // args.mean_response if long_tail else 0
    ends = np.random.default_rng(1).choice(np.arange(3, args.vocab), number, replace=False)
    return Task(
        model=str(model),
        data=str(data),
        dtype=args.dtype,
        prompts=args.prompts,
        max_prompt_tokens=64,
        max_new_tokens=args.max_new_tokens if long_tail else 2 * args.mean_response,
        end_tokens=sorted(ends.tolist()),
        threads=args.threads,
    )


def flatten_distribution(model: Path) -> None:
    file = model / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] *= 0.01
    save_file(weights, file, metadata={"format": "pt"})


def write_prompts(path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = (f"{a} + {b} * {c} =" for a, b, c in rng.integers(100, 10**6, (256, 3)))
    path.write_text("\n".join(json.dumps({"prompt": line, "answer": "0"}) for line in lines))


def megasapo_side(turns: Turns, task: Task) -> None:
    from megasapo import launch, train
    from megasapo.config import from_dict

    device = str(measure.device())
    server = ["--threads", str(task.threads), "--device", device, "--dtype", task.dtype]
    with tempfile.TemporaryDirectory() as directory:
        cfg = from_dict({
            "run": {"dir": directory},
            "model": {"path": task.model, "dtype": task.dtype},
            "data": {"train": task.data, "max_prompt_tokens": task.max_prompt_tokens, "shuffle": False},
            "reward": {"rewards": [{"name": "format", "options": {"pattern": PATTERN, "full": False}}]},
            "rollout": {
                "prompts_per_step": task.prompts, "group_size": GROUP, "max_new_tokens": task.max_new_tokens,
                "stop_token_ids": task.end_tokens, "server_args": server, "publish": "distributed",
            },
            "optim": {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "clip_grad": CLIP},
            "train": {"steps": 10**6, "save_every": 10**6, "micro_batch_tokens": 4096},
            "log": {"sinks": ["jsonl"]},
        })  # fmt: skip
        steps = _Steps(turns, Path(directory) / cfg.run.name / "metrics.jsonl", task.prompts * GROUP)
        launch.stop_flag = lambda: steps.between  # the loop asks it between two steps: there the turn changes
        steps.begin()
        train.train(cfg)


class _Steps:
    """The training loop's question whether to stop, answered when the next turn or the end has come."""

    def __init__(self, turns: Turns, metrics: Path, samples: int) -> None:
        self._turns, self._metrics, self._samples = turns, metrics, samples

    def begin(self) -> bool:
        more = self._turns.wait() is not None
        self._since = _now_with_children()
        return more

    def between(self) -> bool:
        now = _now_with_children()
        numbers = json.loads(self._metrics.read_text().splitlines()[-1])
        self._turns.done({
            "seconds": now.since(self._since),
            "generate_s": numbers["time/rollout_s"],
            "tokens": round(numbers["response/length_mean"] * self._samples),
            "memory_mib": peak_memory_mib(),
        })  # fmt: skip
        return not self.begin()


def _now_with_children() -> Seconds:
    """The clock, and the CPU seconds of this process and of those below it."""
    import psutil

    me = psutil.Process()
    return Seconds(measure.now().clock, sum(map(measure.cpu_s, (me, *me.children(recursive=True)))))


def trl_side(turns: Turns, task: Task) -> None:
    from benchmarks.trl_rl import take_turns

    take_turns(turns, task, PATTERN)


@dataclass
class Seen:
    seconds: list[Seconds]
    generate_s: list[float]
    tokens: list[int]
    memory_mib: float = 0.0

    def add(self, said: Message) -> None:
        self.seconds.append(said["seconds"])
        self.generate_s.append(said["generate_s"])
        self.tokens.append(said["tokens"])
        self.memory_mib = said["memory_mib"]


def compare(task: Task, runs: int, threads: int) -> dict[str, Seen]:
    with sides({"TRL": trl_side, "megasapo": megasapo_side}, task, threads) as both:
        seen = {name: Seen([], [], []) for name in ("megasapo", "TRL")}
        for number in range(1 + runs):
            for name, side in both.items():
                said = side.turn({})
                if number:
                    seen[name].add(said)
    return seen


def table_rows(kind: str, task: Task, seen: dict[str, Seen]) -> list[tuple[str, ...]]:
    rows = []
    for name, side in seen.items():
        speed_up = measure.ratio(seen["TRL"].seconds, side.seconds)
        per_second = statistics.median(t / s.clock for t, s in zip(side.tokens, side.seconds, strict=True))
        generate = statistics.median(side.generate_s)
        *clock, cpu = measure.cells(side.seconds)
        rows.append((
            kind, name, f"{statistics.mean(side.tokens):.0f}", *clock, f"{generate:.2f}", cpu, f"{per_second:.0f}",
            f"{side.memory_mib:.0f}", f"{speed_up.clock:.2f}", f"{speed_up.cpu:.2f}",
        ))  # fmt: skip
    return rows


HEADER = (
    "lengths", "", "response tokens", "s a step", "min", "max", "of it generating", "CPU s", "response tokens/s",
    "peak MiB of the learner", "speed-up: clock", "CPU",
)  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p, vocab=32768)
    defaults = {"prompts": 4, "max-new-tokens": 192, "mean-response": 24, "threads": 1, "runs": 3}
    for name, default in defaults.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--quick", action="store_true", help="2 runs, vocabulary 4096, long tail only")
    args = p.parse_args()
    if args.quick:
        args.runs, args.vocab = 2, 4096
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model", **model_shape(args))
        data = Path(directory) / "prompts.jsonl"
        write_prompts(data)
        flatten_distribution(model)
        for kind in ("long tail",) if args.quick else ("long tail", "to the limit"):
            task = make_task(kind, model, data, args)
            rows += table_rows(kind, task, compare(task, args.runs, args.threads))
    print(measure.machine("transformers", "trl", "megatron-core"))
    print(f"Qwen3-MoE {model_shape(args)}, {args.dtype}; {args.prompts} prompts of {GROUP} samples, at most", end=" ")
    print(f"{args.max_new_tokens} or {2 * args.mean_response} new tokens; medians of {args.runs} alternating steps\n")
    print(measure.table(HEADER, rows))


if __name__ == "__main__":
    main()
