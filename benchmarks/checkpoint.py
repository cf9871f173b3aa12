"""What a training checkpoint adds to a learner step: written beside the training, and while the step waits.

A step is packing and placing the batch, old logprobs, an update of two optimizer steps with all statistics. Each of
three learners takes its turn: one saves nothing, one begins a checkpoint after every step (train.async_save) and one
waits for it. A step of the second pays for its own copy, and for the writing and hashing of the checkpoint before,
which takes another core, memory and Python's lock from it. With train.save_every=N it is an N-th of what is shown, a
step. The ratio is the median over rounds in which all stood side by side; a second learner that saves nothing shows the
noise. The target is 1.10.

    python -m benchmarks.checkpoint [--quick] [--runs 9] [--layers 4] [--vocab 4096] [--mean-response 96]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.learner import Learner, sequences
from benchmarks.learner_work import Work, add_model_options, add_work_options, make_work, model_shape
from benchmarks.measure import Seconds
from megasapo import launch
from megasapo.mcore.topology import Topology
from megasapo.sections import ParallelConfig
from tests.tiny import make_model

MODES = ("none", "beside", "waiting", "none again")
HEADER = ("checkpoint", "seconds", "min", "max", "CPU s", "by none: clock", "CPU", "save takes")


class Saving:
    """A learner whose every step ends with a checkpoint."""

    def __init__(self, mode: str, work: Work, topo: Topology, where: Path) -> None:
        self._learner = Learner(work, topo, train={"async_save": mode == "beside"})
        self._where = where / mode
        self._saves = not mode.startswith("none")
        self._steps = 0
        self.calls: list[float] = []  # seconds that each `save` took

    def step(self, work: Work) -> None:
        self._learner.step(sequences(work))
        began = time.perf_counter()
        self.save()
        self.calls.append(time.perf_counter() - began)

    def save(self) -> None:
        if self._saves:
            self._steps += 1
            self._learner.policy.save(self._where, {"step": self._steps})

    def finish(self) -> None:
        self._learner.policy.finish_saving()

    def bytes(self) -> int:
        last = self._where / "checkpoints" / f"step_{self._steps:08d}"
        return sum(file.stat().st_size for file in last.iterdir())


def compare(
    work: Work, runs: int, steps: int, topo: Topology, where: Path
) -> tuple[dict[str, list[Seconds]], dict[str, Saving]]:
    """Seconds of `steps` steps in a row, round by round, without the wait for what is in flight at their end."""
    learners = {mode: Saving(mode, work, topo, where) for mode in MODES}
    launch.freeze_heap()

    def run(learner: Saving) -> Callable[[], Seconds]:
        def several() -> None:
            for _ in range(steps):
                learner.step(work)

        def turn() -> Seconds:
            learner.save()  # so that the first step, too, stands beside a writer
            seconds = measure.timed(several)
            learner.finish()
            return seconds

        return turn

    return measure.alternate({mode: run(learner) for mode, learner in learners.items()}, runs), learners


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p, vocab=4096)
    add_work_options(p, runs=9)
    p.add_argument("--steps", type=int, default=3, help="in a row, each with its checkpoint")
    p.add_argument("--quick", action="store_true", help="3 rounds")
    args = p.parse_args()
    runs = 3 if args.quick else args.runs
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        make_model(where / "model", kind="moe", **model_shape(args))
        work = make_work("long tail", where / "model", args)
        topo = Topology.init(ParallelConfig())
        seen, learners = compare(work, runs, args.steps, topo, where)
        print(measure.machine("megatron-core"))
        print(
            f"Qwen3-MoE, {args.layers} layers, hidden {args.hidden}, {args.experts} experts, vocabulary {args.vocab}, "
            f"{args.dtype}; {work.tokens} tokens a step; checkpoints of {learners['beside'].bytes() / 2**20:.0f} MiB; "
            f"{args.steps} steps a turn, medians of {runs} alternating turns\n"
        )
        print(measure.table(HEADER, [row(mode, seen, learners[mode], args.steps) for mode in MODES]))
        topo.destroy()


def row(mode: str, seen: dict[str, list[Seconds]], learner: Saving, steps: int) -> tuple[str, ...]:
    seconds = measure.cells([Seconds(run.clock / steps, run.cpu / steps) for run in seen[mode]])
    by_none = measure.ratio(seen[mode], seen["none"])
    call = "" if mode.startswith("none") else f"{statistics.median(learner.calls):.3f}"
    return mode, *seconds, f"{by_none.clock:.3f}", f"{by_none.cpu:.3f}", call


if __name__ == "__main__":
    main()
