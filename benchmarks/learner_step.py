"""One learner step, old logprobs and SAPO update, of megasapo and of TRL's GRPOTrainer on the same batch.

Both sides start from the same Qwen3-MoE and see the same tokens, advantages, split into mini-batches and settings: two
optimizer steps a batch, no activation recompute, AdamW, gradient clipping. With two, TRL computes old logprobs (with
one it takes them from the update's own forward pass). TRL's trainer runs as it is: tokens come in by its `rollout_func`
and rewards by a reward function. Counted for TRL: its old-logprob pass, and from each prepared micro-batch to the end
of the optimizer step. Counted for megasapo: packing and placing the batch, old logprobs, update with all its
statistics. In the first turn, not counted, both must find the same old logprobs and gradient norm: else it stops.

Response lengths: "long tail" are the quantiles of an exponential distribution cut at 4 times its mean, shuffled, so
TRL's padding to the longest costs as it does in reinforcement learning; "equal" are all the mean: packing saves
nothing. Each side has a process of its own with the same number of threads; the two take turns.

    python -m benchmarks.learner_step [--quick] [--vocab 32768] [--mean-response 96] [--sequences 16] [--runs 3]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.learner_work import (
    MINI_BATCHES,
    Work,
    add_model_options,
    add_work_options,
    make_work,
    model_shape,
    peak_memory_mib,
)
from benchmarks.measure import Seconds
from benchmarks.turns import Message, Turns, sides
from megasapo.geometry import read_geometry
from tests.tiny import make_model


def megasapo_side(turns: Turns, work: Work) -> None:
    from benchmarks.learner import Learner, sequences
    from megasapo import metrics
    from megasapo.mcore.topology import Topology
    from megasapo.sections import ParallelConfig

    topo = Topology.init(ParallelConfig())
    learner = Learner(work, topo)
    order: list[int] = []
    found: dict[str, float] = {}

    def learn() -> None:
        is_checked = not found  # the first turn, which is not counted: every old logprob is looked at
        batch = learner.policy.with_old_logprobs(learner.batch(sequences(work, order)), first=is_checked)
        stats = learner.policy.update(batch)
        if is_checked:
            micro = [mb for mini in batch.mini for mb in mini.micro]
            total = sum(float((mb.old_logp * mb.loss_mask).sum()) for mb in micro if mb.old_logp is not None)
            found["old_logp"] = total / sum(map(len, work.responses))
        found["grad_norm"] = metrics.scalars(stats)["grad/norm"]

    while (message := turns.wait()) is not None:
        order[:] = message["order"]
        seconds = measure.timed(learn)
        turns.done({"seconds": seconds, "memory_mib": peak_memory_mib(), **found})
    topo.destroy()


def trl_side(turns: Turns, work: Work) -> None:
    from benchmarks.trl_learner import take_turns

    take_turns(turns, work)


def compare(work: Work, runs: int, threads: int) -> tuple[dict[str, list[Seconds]], dict[str, float]]:
    """Seconds of each side's runs, and peak memory. RuntimeError when the two do not take the same step."""
    with sides({"TRL": trl_side, "megasapo": megasapo_side}, work, threads) as both:
        theirs = both["TRL"].turn({})
        order = {"order": theirs["order"]}
        check_same_step(both["megasapo"].turn(order), theirs)
        seen: dict[str, list[Seconds]] = {"megasapo": [], "TRL": []}
        memory: dict[str, float] = {}
        for _ in range(runs):
            for name in seen:
                said = both[name].turn(order)
                seen[name].append(said["seconds"])
                memory[name] = said["memory_mib"]
    return seen, memory


def check_same_step(ours: Message, theirs: Message) -> None:
    print(f"first turn: old logprob {ours['old_logp']:.5f} and {theirs['old_logp']:.5f} in the mean,", end=" ")
    print(f"gradient norm {ours['grad_norm']:.5f} and {theirs['grad_norm']:.5f} (megasapo, TRL)")
    for name in ("old_logp", "grad_norm"):
        if abs(ours[name] - theirs[name]) > 1e-3 * abs(theirs[name]):
            raise RuntimeError(f"the two sides do not take the same step: {name} {ours[name]} and {theirs[name]}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p, vocab=32768)
    add_work_options(p, runs=3)
    p.add_argument("--trl-micro-batch", type=int, help="sequences; default: a whole mini-batch")
    p.add_argument("--quick", action="store_true", help="2 runs, vocabulary 4096, responses of 64 tokens in the mean")
    args = p.parse_args()
    if args.quick:
        args.runs, args.mean_response, args.vocab = 2, 64, 4096
    shape = model_shape(args)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model", **shape)
        for kind in ("long tail", "equal"):
            work = make_work(kind, model, args)
            seen, memory = compare(work, args.runs, args.threads)
            rows += table_rows(kind, work, seen, memory, model)
    print(measure.machine("transformers", "trl", "megatron-core"))
    print(
        f"Qwen3-MoE {shape}, {args.dtype}; {args.sequences} sequences, prompts of {args.prompt} tokens, responses of",
        end=" ",
    )
    print(
        f"{args.mean_response} in the mean, {MINI_BATCHES} optimizer steps; medians of {args.runs} alternating runs\n"
    )
    print(measure.table(HEADER, rows))


HEADER = (
    "lengths", "learner", "tokens", "computed", "seconds", "min", "max", "CPU s", "tokens/s", "TFLOP/s", "peak MiB",
    "speed-up: clock", "CPU",
)  # fmt: skip


def table_rows(
    kind: str, work: Work, seen: dict[str, list[Seconds]], memory: dict[str, float], model: Path
) -> list[tuple[str, ...]]:
    geometry = read_geometry(model)
    flops = geometry.forward_flops(work.lengths) + geometry.training_flops(work.lengths)
    rows = []
    for name, runs in seen.items():
        clock, speed_up = measure.median(runs).clock, measure.ratio(seen["TRL"], runs)
        computed = work.padded_tokens if name == "TRL" else work.tokens
        rows.append((
            kind, name, str(work.tokens), str(computed), *measure.cells(runs), f"{work.tokens / clock:.0f}",
            f"{flops / clock / 1e12:.4f}", f"{memory[name]:.0f}",
            f"{speed_up.clock:.2f}", f"{speed_up.cpu:.2f}",
        ))  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
