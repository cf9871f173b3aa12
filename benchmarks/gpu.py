"""The learner's step on one GPU: a slice of Qwen3-30B-A3B at 16k packed tokens, in bfloat16 and in each FP8 recipe.

A step is Policy.update on one pack: forward, backward, all statistics, optimizer. Model FLOPs are those of
Geometry.training_flops; beside them stands the rate of a large square bfloat16 product on this very card, measured in
the same run. Also: what recording and replaying the routing adds, and the output head beside its three products and
beside full logits. Prints the targets with what was reached. Writes gpu.md and gpu_profile.txt (kernels by time) into
--out, by default docs/benchmarks on a GPU and nowhere on a CPU, whose figures mean nothing.

    python -m benchmarks.gpu [--quick] [--recipes bf16 fp8_blockwise] [--override moe_permute_fusion=true]
    python -m benchmarks.gpu --device cpu --tiny        the script itself, on any machine
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks import measure
from benchmarks.gpu_work import (
    SLICE,
    TINY,
    Clock,
    Work,
    learner,
    median_seconds,
    medians,
    timed_calls,
    write_model,
)
from benchmarks.head import Inputs, backward, extra_bytes, full_logits, of_scores
from benchmarks.head import ours as our_scores
from megasapo.config import ConfigError
from megasapo.geometry import Geometry, read_geometry
from megasapo.mcore.topology import Topology
from megasapo.sections import ParallelConfig

RECIPES = ("bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise", "mxfp8")
BF16_SHARE, FP8_SPEEDUP, HEAD_BY_PRODUCTS = 0.45, 1.25, 1.25  # the targets
STEP_HEADER = ("recipe", "step ms", "of it optimizer ms", "tokens/s", "model TFLOP/s", "of GEMM rate", "peak GiB")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


@dataclass(frozen=True)
class Step:
    """What was measured of one recipe; `refused` instead where the machine cannot run it."""

    recipe: str
    seconds: float = 0.0
    optimizer_s: float = 0.0
    flops: float = 0.0  # a second, of the model
    peak_bytes: int = 0
    refused: str = ""


def gemm_rate(work: Work, device: torch.device, size: int) -> float:
    """FLOP/s of a square product in bfloat16."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), work, device)


def measure_step(recipe: str, work: Work, topo: Topology, geometry: Geometry, profiles: list[str]) -> Step:
    print(f"measuring {recipe}", file=sys.stderr, flush=True)
    try:
        with learner(work, topo, recipe=recipe) as made:
            _reset_peak(topo.device)
            with timed_calls(made.policy._optimizer, "step", topo.device) as optimizer:
                seconds = median_seconds(made.step, work, topo.device)
            optimizer_s = _median(optimizer[-work.runs :])
            peak = _peak(topo.device)
            profiles.append(f"{recipe}\n\n{profile(made.step, topo.device)}")
            print(f"{recipe}: {1e3 * seconds:.1f} ms a step", file=sys.stderr, flush=True)
            return Step(recipe, seconds, optimizer_s, geometry.training_flops(work.lengths) / seconds, peak)
    except ConfigError as e:
        return Step(recipe, refused=str(e).splitlines()[0])


def profile(step: Callable[[], None], device: torch.device) -> str:
    """The operators and kernels of one step that took longest."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=100)


def replay_rows(work: Work, topo: Topology) -> list[tuple[str, ...]]:
    """One step with its pass for old logprobs: without replay, and as R2 and R3 make it."""
    with learner(work, topo, replay="R2") as made:
        policy, micro = made.policy, made.batch.mini[0].micro
        _, routing = policy.natural_logprobs(micro)
        routed = made.policy.with_old_logprobs(made.batch, first=True)
        plain = made.batch
        seen = medians(
            {
                "old": lambda: policy._logprobs(micro),
                "old, recorded": lambda: policy.natural_logprobs(micro),
                "old, replayed": lambda: policy.routed_logprobs(micro, routing),
                "update": lambda: policy.update(plain),
                "update, replayed": lambda: policy.update(routed),
            },
            work,
            topo.device,
        )
    total = {
        "none": seen["old"] + seen["update"],
        "R2": seen["old, recorded"] + seen["update, replayed"],
        "R3": seen["old, replayed"] + seen["update, replayed"],
    }
    return [(name, f"{1e3 * s:.2f}", f"{s / total['none']:.3f}") for name, s in total.items()]


@dataclass(frozen=True)
class Head:
    seconds: dict[str, float]
    extra_bytes: dict[str, int]

    @property
    def by_products(self) -> float:
        return self.seconds["ours"] / self.seconds["three products"]


def measure_head(work: Work, device: torch.device, shape: dict[str, Any]) -> Head:
    """Forward and backward of the output head, by the clock and in memory above its inputs."""
    sizes = {"batch": 1, "length": work.tokens, "hidden": shape["hidden_size"], "vocab": shape["vocab_size"]}
    given = {"share": 1.0, "dtype": "bfloat16", "device": device, "kernel": "auto"}
    inputs = Inputs.make(argparse.Namespace(**sizes, **given))
    main_grad = torch.zeros_like(inputs.weight, dtype=torch.float32)  # as in training
    inputs.weight.main_grad = main_grad  # type: ignore[attr-defined]

    def ours(x: Inputs) -> Tensor:
        x.weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        return of_scores(x, our_scores(x, True)[0], None)

    @torch.no_grad()
    def products(x: Inputs) -> None:
        logits = x.hidden @ x.weight.t()
        logits @ x.weight
        logits.t() @ x.hidden

    runs: dict[str, Callable[[Inputs], Tensor | None]] = {
        "ours": ours,
        "full logits": lambda x: of_scores(x, *full_logits(x, False)),
        "three products": products,
    }
    extra = {name: extra_bytes(run, inputs) for name, run in runs.items()}
    return Head(medians({name: partial(backward, run, inputs) for name, run in runs.items()}, work, device), extra)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def _median(clocks: list[Clock]) -> float:
    return sorted(clock.seconds() for clock in clocks)[len(clocks) // 2]


def step_table(steps: list[Step], work: Work, rate: float) -> str:
    rows = []
    for s in steps:
        if s.refused:
            rows.append((s.recipe, "refused", *["-"] * 5))
            continue
        rows.append((
            s.recipe, f"{1e3 * s.seconds:.1f}", f"{1e3 * s.optimizer_s:.1f}", f"{work.tokens / s.seconds:,.0f}",
            f"{s.flops / 1e12:.1f}", f"{s.flops / rate:.1%}", f"{s.peak_bytes / 2**30:.1f}",
        ))  # fmt: skip
    refused = "".join(f"\n\n{s.recipe} is refused: {s.refused}" for s in steps if s.refused)
    return measure.table(STEP_HEADER, rows) + refused


def head_table(head: Head) -> str:
    rows = []
    for name, seconds in head.seconds.items():
        by = seconds / head.seconds["three products"]
        rows.append((name, f"{1e3 * seconds:.2f}", f"{by:.2f}", f"{head.extra_bytes[name] / 2**20:.0f}"))
    return measure.table(("head", "ms", "by three products", "extra MiB"), rows)


def targets(steps: list[Step], head: Head, rate: float) -> str:
    """Each target, what was reached, and whether that is enough."""
    by_name = {s.recipe: s for s in steps if not s.refused}
    rows = []
    if plain := by_name.get("bf16"):
        share = plain.flops / rate
        rows.append(("bf16, share of the GEMM rate", f"{BF16_SHARE:.0%}", f"{share:.1%}", share >= BF16_SHARE))
        for name, s in by_name.items():
            if name != "bf16":
                faster = plain.seconds / s.seconds
                rows.append((f"{name}, by bf16", f"{FP8_SPEEDUP}x", f"{faster:.2f}x", faster >= FP8_SPEEDUP))
    reached = head.by_products
    rows.append(("head, by its three products", f"{HEAD_BY_PRODUCTS}x", f"{reached:.2f}x", reached <= HEAD_BY_PRODUCTS))
    lines = [(what, target, found, "met" if met else "not met") for what, target, found, met in rows]
    return measure.table(("target", "wanted", "reached", ""), lines)


def report(args: argparse.Namespace, work: Work, topo: Topology, shape: dict[str, Any]) -> tuple[str, str]:
    """The page, and the profiles."""
    device, geometry = topo.device, read_geometry(work.model)
    rate = gemm_rate(work, device, args.gemm)
    profiles: list[str] = []
    steps = [measure_step(recipe, work, topo, geometry, profiles) for recipe in args.recipes]
    replay = replay_rows(work, topo)
    head = measure_head(work, device, shape)
    machine = measure.machine("megatron-core", "transformer-engine", "triton")
    parameters = geometry.parameters()
    parts = [
        f"# The learner's step on one {'GPU' if device.type == 'cuda' else 'CPU (the script alone is tried out)'}",
        f"Made by `python -m benchmarks.gpu`. {machine}",
        f"{geometry.layers} layers of hidden {geometry.hidden}, {geometry.heads} heads on {geometry.kv_heads}, "
        f"{geometry.experts} experts of width {geometry.moe_ffn}, top-{geometry.top_k}, vocabulary {geometry.vocab}: "
        f"{parameters.total / 1e9:.2f} billion parameters, {parameters.active / 1e9:.2f} active; random weights. "
        f"{work.tokens} tokens in one pack of {len(work.lengths)} sequences, the longest {max(work.lengths)}. Medians "
        f"of {work.runs} after {work.warm_up} to warm up. A bfloat16 product of {args.gemm} cubed runs at "
        f"{rate / 1e12:.1f} TFLOP/s." + (f" Overrides: {work.overrides}." if work.overrides else ""),
        step_table(steps, work, rate),
        "Old logprobs and update, without replay and with it:\n\n" + measure.table(("replay", "ms", "by none"), replay),
        "The output head with entropies, forward and backward:\n\n" + head_table(head),
        targets(steps, head, rate),
    ]
    return "\n\n".join(parts) + "\n", "\n\n".join([machine, *profiles]) + "\n"


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--tiny", action="store_true", help="a model of no use but to try the script out")
    p.add_argument("--quick", action="store_true", help="3 runs, bf16 and fp8_blockwise only")
    p.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    p.add_argument("--tokens", type=int, default=16384, help="in the pack; a multiple of 8192 suits every recipe")
    p.add_argument("--runs", type=int, default=12)
    p.add_argument("--gemm", type=int, default=8192, help="sides of the product that sets the card's rate")
    p.add_argument("--override", nargs="+", default=[], metavar="NAME=VALUE", help="fields of TransformerConfig")
    p.add_argument("--out", type=Path, help="directory for gpu.md and gpu_profile.txt")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("torch finds no CUDA GPU; --device cpu --tiny tries the script out")
    if args.device == "cpu" and torch.cuda.is_available():
        p.error("the learner takes the GPU where there is one: run with CUDA_VISIBLE_DEVICES= for --device cpu")
    if args.quick:
        args.runs, args.recipes = 3, ["bf16", "fp8_blockwise"]
    if args.tiny:
        args.tokens, args.runs, args.gemm = 256, 2, 128
    if args.out is None and args.device == "cuda" and not args.tiny:
        args.out = DOCS
    return args


def main() -> None:
    args = options()
    shape = TINY if args.tiny else SLICE
    overrides = {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in args.override)}
    topo = Topology.init(ParallelConfig())
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory) / "model", shape)
        work = Work(model, args.tokens, args.runs, warm_up=1 if args.tiny else 3, overrides=overrides)
        page, profiles = report(args, work, topo, shape)
    topo.destroy()
    print(page)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gpu.md").write_text(page)
        (args.out / "gpu_profile.txt").write_text(profiles)
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
