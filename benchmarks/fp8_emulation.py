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

import torch

from benchmarks import measure
from benchmarks.learner import Learner, sequences
from benchmarks.learner_work import add_model_options, add_work_options, make_work, model_shape
from megasapo.mcore.topology import Topology
from megasapo.sections import ParallelConfig
from tests.tiny import make_model

RECIPES = ("none", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p, vocab=4096)
    add_work_options(p, runs=3)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        work = make_work("long tail", make_model(Path(directory) / "model", **model_shape(args)), args)
        topo = Topology.init(ParallelConfig())
        rows = sequences(work)
        turns = {}
        for recipe in RECIPES:
            precision = {} if recipe == "none" else {"recipe": recipe, "emulate": True}
            learner = Learner(work, topo, algo={"mini_batches": 1}, precision=precision)
            turns[recipe] = partial(measure.timed, partial(learner.step, rows, first=True))
        seen = measure.alternate(turns, args.runs)
        topo.destroy()
    lines = []
    for recipe in RECIPES:
        middle, times = measure.median(seen[recipe]), measure.ratio(seen[recipe], seen["none"])
        lines.append((recipe, f"{middle.clock:.2f}", f"{middle.cpu:.2f}", f"{times.cpu:.2f}"))
    print(measure.machine("megatron-core"))
    print(f"Qwen3-MoE {model_shape(args)}, {args.dtype}; {work.tokens} tokens; medians of {args.runs} turns\n")
    print(measure.table(("recipe", "seconds", "CPU s", "CPU / none's"), lines))


if __name__ == "__main__":
    main()
