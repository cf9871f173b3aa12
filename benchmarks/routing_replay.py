"""What recording and replaying the routing adds to a learner step: R2 and R3 beside no replay, on one batch.

A step is what train.py does with a batch: packing and placing it, old logprobs, an update of two optimizer steps with
all statistics. R2 records the routing while the second mini-batch's old logprobs are computed and replays it in its
update; R3 replays in every pass what a rollout server would have sent, here the experts that the starting weights
choose, so that all send the same tokens to the same experts. They take turns in one process, each with a policy of its
own, in an order that rotates; the ratio is the median over rounds. A second policy without replay shows the noise. The
target is 1.05.

    python -m benchmarks.routing_replay [--quick] [--runs 9] [--layers 4] [--vocab 4096] [--mean-response 96]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from benchmarks.learner import Learner, sequences
from benchmarks.learner_work import MINI_BATCHES, Work, add_model_options, add_work_options, make_work, model_shape
from benchmarks.measure import Seconds
from megasapo.data.packing import join, pieces
from megasapo.mcore.topology import Topology
from megasapo.sections import ParallelConfig
from megasapo.types import TrainSequence
from tests.tiny import make_model

MODES = {"none": "none", "R2": "R2", "R3": "R3", "none again": "none"}
# experts, how many of them a token goes to, and the width that keeps the work of a token's experts the same
ROUTERS = {"2 of 8": (8, 2, 384), "8 of 128": (128, 8, 96)}
HEADER = ("router", "replay", "tokens", "seconds", "min", "max", "CPU s", "by none: clock", "CPU")


def chosen_now(learner: Learner, rows: list[TrainSequence]) -> dict[int, np.ndarray]:
    """[n - 1, L, K] of each sequence, as the routers of a learner that replays (R2) choose now."""
    batch = learner.policy.with_old_logprobs(learner.batch(rows), first=True)
    micro = [mb for mini in batch.mini for mb in mini.micro]
    return join(pieces(mb, mb.routing) for mb in micro if mb.routing is not None)


def compare(work: Work, runs: int, topo: Topology) -> dict[str, list[Seconds]]:
    """Seconds of each mode's steps, in the order of the rounds."""
    rows = sequences(work)
    learners = {name: Learner(work, topo, algo={"routing_replay": mode})
                for name, mode in MODES.items()}  # fmt: skip
    routing = chosen_now(learners["R2"], rows)
    routed = [dataclasses.replace(row, routing=routing[row.uid]) for row in rows]

    def run(learner: Learner, given: list[TrainSequence]) -> Callable[[], Seconds]:
        return lambda: measure.timed(lambda: learner.step(given))

    steps = {name: run(learner, routed if MODES[name] == "R3" else rows) for name, learner in learners.items()}
    return measure.alternate(steps, runs, rotate=True)


def table_rows(router: str, work: Work, seen: dict[str, list[Seconds]]) -> list[tuple[str, ...]]:
    rows = []
    for mode, runs in seen.items():
        by_none = measure.ratio(runs, seen["none"])
        ratios = f"{by_none.clock:.3f}", f"{by_none.cpu:.3f}"
        rows.append((router, mode, str(work.tokens), *measure.cells(runs), *ratios))
    return rows


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p, vocab=4096)
    add_work_options(p, runs=9)
    p.add_argument("--quick", action="store_true", help="6 runs, responses of 48 tokens in the mean")
    args = p.parse_args()
    if args.quick:
        args.runs, args.mean_response = 6, 48
    return args


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    topo = Topology.init(ParallelConfig())
    rows: list[tuple[str, ...]] = []
    shape: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for router, (experts, chosen, width) in ROUTERS.items():
            args.experts, args.moe_intermediate = experts, width
            shape = model_shape(args) | {"num_experts_per_tok": chosen}
            work = make_work("long tail", make_model(Path(directory) / str(experts), **shape), args)
            rows += table_rows(router, work, compare(work, args.runs, topo))
    topo.destroy()
    print(measure.machine("megatron-core"))
    print(
        f"Qwen3-MoE, {args.layers} layers, hidden {args.hidden}, vocabulary {args.vocab}, {args.dtype}; "
        f"{args.sequences} sequences, prompts of {args.prompt} tokens, responses of {args.mean_response} in the mean, "
        f"{MINI_BATCHES} optimizer steps; medians of {args.runs} alternating runs\n"
    )
    print(measure.table(HEADER, rows))


if __name__ == "__main__":
    main()
