"""How far a learner's logprobs lie from those of the server that sampled, for each precision of either.

The cold-started model of examples/arithmetic answers its held-out problems, served in model.dtype and in FP8 blocks;
the learner scores the very tokens with the same weights under every recipe (emulated) and the experts that it chooses
itself. The first half of the responses only fills the history of fp8_delayed, in one pass with gradients.

    python -m benchmarks.fp8_gap [--model DIR] [--samples 8] [--dtype bfloat16] [--out docs/benchmarks/fp8.md]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import measure
from megasapo import config
from megasapo.algo.estimators import mismatch_kl
from megasapo.config import Config
from megasapo.data.prompts import PromptDataset
from megasapo.data.tokenizer import load_tokenizer
from megasapo.geometry import read_config, read_geometry
from megasapo.mcore import model, step
from megasapo.mcore.replay import RoutingReplay
from megasapo.mcore.scorer import Scorer
from megasapo.mcore.topology import Topology
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.weight_files import Writer
from megasapo.routing.flips import flips
from megasapo.routing.validate import RoutingRule, validate
from megasapo.sections import PrecisionConfig
from megasapo.types import SamplingParams

EXAMPLE = Path(__file__).parents[1] / "examples" / "arithmetic"
RECIPES = ("bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise", "mxfp8")
ROLLOUTS: tuple[Literal["none", "fp8_block"], ...] = ("none", "fp8_block")


@dataclass(frozen=True)
class Sampled:
    """One response as its server saw it."""

    tokens: np.ndarray  # [n]
    logp: np.ndarray  # [R] of the last R tokens
    routing: np.ndarray  # [n - 1, L, K]


def cast(source: Path, target: Path, dtype: torch.dtype) -> None:
    """The model in the dtype that both sides are to have."""
    writer = Writer(target)
    writer.add([(name, tensor.to(dtype)) for name, tensor in load_file(source / "model.safetensors").items()])
    writer.finish(source, read_config(source) | {"dtype": str(dtype).removeprefix("torch.")})


def sample(cfg: Config, run_dir: Path, samples: int) -> list[Sampled]:
    """`samples` responses to every held-out problem."""
    assert cfg.data.eval is not None
    prompts = PromptDataset(cfg.data.eval, load_tokenizer(cfg.model.path), cfg.data).prompts
    inputs = [p.input_ids for p in prompts for _ in range(samples)]
    params = [SamplingParams(cfg.rollout.max_new_tokens, sampling_seed=i) for i in range(len(inputs))]
    rule = RoutingRule.of(read_geometry(cfg.model.path))

    async def ask(fleet: Fleet) -> list[Any]:
        completions = await fleet.generate(inputs, params, return_routed_experts=True)
        await fleet.close()
        return completions

    with Fleet.start(cfg.rollout, cfg.model.path, run_dir, routing=True) as fleet:
        completions = asyncio.run(ask(fleet))
    found = []
    for ids, completion in zip(inputs, completions, strict=True):
        tokens = np.asarray([*ids, *completion.output_ids], dtype=np.int32)
        routing = validate(completion.routed_experts, tokens=len(tokens), rule=rule, where=str(ids))
        found.append(Sampled(tokens, completion.logprobs, routing))
    return found


def gap(cfg: Config, topo: Topology, warm_up: Sequence[Sampled], measured: Sequence[Sampled]) -> list[str]:
    """One row: the learner of `cfg` against what the server said of `measured`."""
    scorer = with_history(cfg, topo, warm_up) if cfg.precision.recipe == "fp8_delayed" else Scorer(cfg, topo)
    scorer.load(Path(cfg.model.path))
    scored = scorer.score([s.tokens for s in measured], with_routing=True)
    difference = torch.from_numpy(
        np.concatenate([own.logp[-len(s.logp) :] - s.logp for own, s in zip(scored, measured, strict=True)])
    ).double()
    changed = [
        flips(s.routing, own.choices) for own, s in zip(scored, measured, strict=True) if own.choices is not None
    ]
    choices = sum(int(f.known.sum()) for f in changed) * measured[0].routing.shape[2]
    off = difference.expm1().abs()
    return [
        f"{mismatch_kl(difference, torch.zeros_like(difference)).mean():.2e}",
        f"{difference.abs().mean():.4f}",
        f"{difference.var():.2e}",
        f"{(off > 0.01).double().mean():.1%}",
        f"{(off > 0.1).double().mean():.2%}",
        f"{sum(int(f.num.sum()) for f in changed) / choices:.2%}",
    ]


def with_history(cfg: Config, topo: Topology, responses: Sequence[Sampled]) -> Scorer:
    """A scorer of recipe fp8_delayed, which Scorer refuses for want of a history: one pass with gradients makes it."""
    scorer = Scorer(cfg.model_copy(update={"precision": PrecisionConfig()}), topo)
    hf_config = model.read_hf_config(cfg.model.path)
    scorer._chunks = [*model.build_model(cfg.model, hf_config, topo, precision=cfg.precision)]
    scorer._replay = RoutingReplay(scorer._chunks)
    scorer.load(Path(cfg.model.path))
    micro = scorer._micro_batches([s.tokens for s in responses])
    step.forward_backward(
        scorer._chunks, micro, topo, lambda scores, _: (scores.logp.sum(), {}), temperature=1.0, with_entropy=False
    )
    return scorer


def settings(path: Path, a: argparse.Namespace, *overrides: str) -> Config:
    return config.load(
        EXAMPLE / "sapo.yaml",
        [
            *(f"model.path={path}", f"model.dtype={a.dtype}", f"data.eval={a.data}", f"data.train={a.data}"),
            *("parallel.ep=1", f"rollout.server_args=[--threads, '1', --dtype, {a.dtype}]"),
            *overrides,
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Logprobs of learner and server under each pairing of precisions")
    parser.add_argument("--model", type=Path, default=EXAMPLE / "out" / "cold-start")
    parser.add_argument("--data", type=Path, default=EXAMPLE / "out" / "eval.jsonl")
    parser.add_argument("--samples", type=int, default=8, help="responses to a problem")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of both sides")
    parser.add_argument("--out", type=Path, help="file whose table is replaced; default: print")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        lines = table(a, Path(scratch))
    print(lines)
    if a.out is not None:
        measure.replace_section(a.out, "<!-- measured -->", "<!-- end -->", lines)


def table(a: argparse.Namespace, scratch: Path) -> str:
    path = scratch / "model"
    cast(a.model, path, getattr(torch, a.dtype))
    sampled = {
        kind: sample(settings(path, a, f"rollout.quantization={kind}"), scratch / kind, a.samples) for kind in ROLLOUTS
    }
    cfg = settings(path, a)
    topo = Topology.init(cfg.parallel, seed=0)
    rows = []
    try:
        for recipe in RECIPES:
            precision = [] if recipe == "bf16" else [f"precision.recipe={recipe}", "precision.emulate=true"]
            cfg = settings(path, a, *precision)
            for kind, responses in sampled.items():
                half = len(responses) // 2
                name = a.dtype if recipe == "bf16" else recipe
                served = a.dtype if kind == "none" else kind
                rows.append([name, served, *gap(cfg, topo, responses[:half], responses[half:])])
    finally:
        topo.destroy()
    header = ["learner", "rollout", "mismatch/kl (k3)", "mean abs. difference", "variance", "> 1 %", "> 10 %", "flips"]
    tokens = " and ".join(str(sum(len(s.logp) for s in r[len(r) // 2 :])) for r in sampled.values())
    sizes = read_geometry(path)
    return "\n".join(
        [
            measure.machine("megatron-core", "transformers") + ".",
            f"{sizes.layers} layers, hidden {sizes.hidden}, {sizes.experts} experts of width {sizes.moe_ffn}, top-"
            f"{sizes.top_k}; {tokens} response tokens (from the {a.dtype} and the FP8 server).",
            "",
            measure.table(header, rows),
        ]
    )


if __name__ == "__main__":
    main()
