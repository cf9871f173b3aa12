"""The routing trace and the validation before it: bytes on disk, rate, and how long the training loop is held.

A batch of random expert choices (the worst case: nothing in them can be compressed) is validated, then written for some
steps by the trace's own thread, as train.py does. Ratios are of the ids' own bytes, 1 each up to 256 experts, else 2.
"held": what `add` takes in a loop whose steps take --step-s; it waits where more than trace.QUEUED_BYTES are queued.
The default is 64 responses of 4096 tokens in a model of 48 MoE layers, 128 experts, top-8 (Qwen3-30B-A3B).

    python -m benchmarks.routing_trace [--sequences 64] [--tokens 4096] [--layers 48] [--experts 128] [--top-k 8]
                                       [--rate 1.0] [--steps 3] [--step-s 10]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import measure
from megasapo.routing.trace import TraceRow, TraceWriter, is_traced
from megasapo.routing.validate import RoutingRule, validate


def random_routing(tokens: int, rule: RoutingRule, rng: np.random.Generator) -> np.ndarray:
    """[tokens, L, K] int32: rows in which an expert comes twice are drawn again."""
    rows = rng.integers(rule.num_experts, size=(tokens * rule.num_layers, rule.top_k), dtype=np.int32)
    while True:
        ordered = np.sort(rows, axis=1)
        (twice,) = np.nonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(twice):
            return rows.reshape(tokens, rule.num_layers, rule.top_k)
        rows[twice] = rng.integers(rule.num_experts, size=(len(twice), rule.top_k), dtype=np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Size and speed of the routing trace")
    for name, value in (("sequences", 64), ("tokens", 4096), ("layers", 48), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1.0, help="routing.trace_rate")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--step-s", type=float, default=10.0, help="seconds between two steps")
    a = parser.parse_args()
    rule = RoutingRule(a.layers, tuple(range(a.layers)), a.experts, a.top_k)
    rng = np.random.default_rng(0)
    sent = [random_routing(a.tokens, rule, rng) for _ in range(a.sequences)]
    print(measure.machine("numpy", "pyarrow"))
    start = time.perf_counter()
    checked = [validate(r, tokens=a.tokens + 1, rule=rule, where=f"sample {i}") for i, r in enumerate(sent)]
    seconds = time.perf_counter() - start
    num_ids = sum(r.size for r in sent)
    print(f"validation: {num_ids / 1e6:.0f} M ids in {seconds:.2f} s, {num_ids / 1e6 / seconds:.0f} M ids/s")
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), a, rule, checked)


def write(directory: Path, a: argparse.Namespace, rule: RoutingRule, checked: list[np.ndarray]) -> None:
    writer = TraceWriter(
        directory,
        rate=a.rate,
        budget_bytes=1 << 50,
        layers=rule.moe_layers,
        num_experts=rule.num_experts,
        top_k=rule.top_k,
    )
    held, busy, own_bytes = [], 0.0, 0
    for step in range(1, a.steps + 1):
        rows = [TraceRow(step * a.sequences + i, "rollout", step, step, 100, r) for i, r in enumerate(checked)]
        own_bytes += sum(r.routing.nbytes for r in rows if is_traced(r.uid, a.rate, 0))
        start = time.perf_counter()
        writer.add(step=step, sequences=rows)
        held.append(time.perf_counter() - start)
        writer.flush()
        took = time.perf_counter() - start
        busy += took
        time.sleep(max(0.0, a.step_s - took))
    writer.close()
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(f"on disk: {size / own_bytes:.4f} of the ids' {own_bytes / 1e6:.0f} MB")
    print(f"write rate: {own_bytes / 1e6 / busy:.0f} MB/s of ids, flushed to disk")
    print(f"held: {1e3 * statistics.median(held):.1f} ms a step in the median, {1e3 * max(held):.1f} ms at most")


if __name__ == "__main__":
    main()
