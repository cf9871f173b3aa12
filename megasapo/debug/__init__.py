"""`megasapo debug`: scores a run's dumped samples again and says where the learner and the rollout server part.

Each sample is scored under its own routing, the learner's (R2) and the server's (R3), with the weights that sampled it
and, if asked for, with later ones, other layouts and other dtypes. samples.py reads what the run dumped, weights.py
finds weights, passes.py scores, compare.py compares, text.py prints. docs/debugging.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasapo import config, run
from megasapo.arguments import Parser
from megasapo.config import Config, ConfigError
from megasapo.debug import compare, text
from megasapo.debug.passes import UNQUANTISED, Passes, Variant, Weights, score_all
from megasapo.debug.samples import Dumped, choose, read_samples
from megasapo.debug.weights import find
from megasapo.geometry import Geometry, read_geometry
from megasapo.layout import check_layout, fewest_ranks
from megasapo.placed import placed, refuse_unwritable
from megasapo.sections import PrecisionConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, checked."""

    run_dir: Path
    step: int
    configs: Mapping[str, Config]  # by what --against says or UNQUANTISED, "" first
    geometry: Geometry
    samples: Sequence[Dumped]
    in_step: int  # samples of the whole step
    weights: Weights
    tolerance: float

    @property
    def layers(self) -> list[int]:
        """The decoder layers with experts."""
        return [i for i, sparse in enumerate(self.geometry.moe_layers) if sparse]


def main(argv: list[str]) -> int:
    """Entry of the command; starts the ranks it needs and runs on each."""
    args = _parser().parse_intermixed_args(argv)
    refuse_unwritable(args.json, "--json")
    plan = _plan(args)
    parallels = [cfg.parallel for cfg in plan.configs.values()]
    smallest = math.lcm(*map(fewest_ranks, parallels))
    nproc = run.world_size(plan.configs[""].parallel, smallest if args.nproc is None else args.nproc)
    for parallel in parallels:
        check_layout(parallel, nproc, plan.geometry)
    code = run.on_ranks("debug", argv, nproc, parallels)
    if code is None:
        passes, is_main = score_all(plan.configs, plan.samples, plan.weights)
        if is_main:
            _report(plan, passes, args.json)
    return code or 0


def _parser() -> Parser:
    parser = Parser(prog="megasapo debug", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="whose samples: RUN_DIR/rollouts/step_N")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--sample", type=int, metavar="K", help="one of the step, by its place (default: all)")
    one.add_argument("--uid", type=int, help="one of the step, by its uid in RUN_DIR/routing and the report")
    parser.add_argument("--limit", type=int, default=16, metavar="M", help="most samples without --sample (default 16)")
    weights = "a step, an HF directory or a training checkpoint"
    parser.add_argument(
        "--behaviour", metavar="PATH|STEP", help=f"weights that sampled, by default as dumped: {weights}"
    )
    parser.add_argument(
        "--weights", metavar="PATH|STEP", help="later ones (the current weights), for the terms update and drift"
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar='"a.b=c ..."',
        help="score also with these settings, such as parallel.tp=2 or model.dtype=float32; may be repeated",
    )
    parser.add_argument(
        "--unquantised", action="store_true", help="score also without the run's FP8, for the term fp8 and its tokens"
    )
    parser.add_argument("--tolerance", type=float, default=0.1, help="logprobs further apart are shown (default 0.1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--nproc", type=int, help="ranks on this machine (default: as few as the layouts need)")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="a.b=c",
        help="settings over the run's own; the layout is one rank unless given",
    )
    return parser


def _plan(args: argparse.Namespace) -> Plan:
    run_dir: Path = args.run_dir
    if args.limit < 1 or not args.tolerance > 0:
        raise ConfigError(f"--limit {args.limit}, --tolerance {args.tolerance}: both must be above 0")
    source = run_dir / "config.yaml"
    if not source.is_file():
        raise ConfigError(f"{run_dir} is not the directory of a run: it has no config.yaml")
    raw = config.read(source) | {"parallel": {}}
    configs = {"": config.from_dict(raw, args.overrides, source=str(source))}
    for against in args.against:
        configs[against] = config.from_dict(raw, [*args.overrides, *against.split()], source=f"--against {against}")
        if configs[against].model.path != configs[""].model.path:
            raise ConfigError(f"--against {against!r}: other weights are given with --weights, not with model.path")
    cfg = configs[""]
    if args.unquantised:
        if not cfg.precision.quantises:
            raise ConfigError(
                "--unquantised: precision.recipe=bf16 quantises nothing. To see what FP8 would do, give a recipe too: "
                "precision.recipe=fp8_blockwise precision.emulate=true"
            )
        configs[UNQUANTISED] = cfg.model_copy(update={"precision": PrecisionConfig()})
    geometry = read_geometry(cfg.model.path)
    samples = read_samples(run_dir, args.step, group_size=cfg.rollout.group_size, geometry=geometry)
    chosen = choose(samples, number=args.sample, uid=args.uid, limit=args.limit)
    weights = _weights(run_dir, cfg.model.load or cfg.model.path, chosen, args.behaviour, args.weights)
    return Plan(run_dir, args.step, configs, geometry, chosen, len(samples), weights, args.tolerance)


def _weights(
    run_dir: Path, started_from: str, samples: Sequence[Dumped], behaviour: str | None, current: str | None
) -> Weights:
    # where weights changed while a response was sampled, its first token tells about the older ones
    directories = {s.number: find(run_dir, started_from, behaviour or str(s.version_min)) for s in samples}
    return Weights(directories, None if current is None else find(run_dir, started_from, current))


def _report(plan: Plan, passes: Passes, out: Path | None) -> None:
    from megasapo.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(plan.configs[""].model.path)
    record = _record(plan, passes)
    print(text.render(record, lambda ids: tokenizer.decode(ids)), flush=True)
    if out is not None:
        with placed(out) as unfinished:
            unfinished.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        print(f"everything: {out}")


def _record(plan: Plan, passes: Passes) -> dict[str, Any]:
    """All that was found, for JSON and for text."""
    samples = plan.samples
    return {
        "run": str(plan.run_dir),
        "step": plan.step,
        "samples_in_step": plan.in_step,
        "tolerance": plan.tolerance,
        "weights": sorted({str(path) for path in plan.weights.behaviour.values()}),
        "current_weights": None if plan.weights.current is None else str(plan.weights.current),
        "model_layers": plan.layers,
        "overall": _findings(plan, passes, samples) | {"samples": len(samples)},
        "samples": [
            {
                "number": s.number,
                "uid": s.uid,
                "prompt_tokens": s.prompt_tokens,
                "response_tokens": len(s.tokens) - s.prompt_tokens,
                "version_min": s.version_min,
                "version_max": s.version_max,
                "routing_traced": s.routing is not None,
                "routing_shift": compare.shift(s, passes),
                **_findings(plan, passes, [s]),
                "first_rerouted": {str(v): compare.first_rerouted(v, s, passes, plan.layers) for v in _natural(passes)},
                "first_beyond": {
                    str(v): compare.first_beyond(v, s, passes, plan.tolerance) for v in passes if s.number in passes[v]
                },
                "fp8": compare.fp8_tokens(s, passes),
            }
            for s in samples
        ],
    }


def _findings(plan: Plan, passes: Passes, samples: Sequence[Dumped]) -> dict[str, Any]:
    present = [v for v in passes if any(s.number in passes[v] for s in samples)]
    return {
        "variants": [compare.row(v, samples, passes, plan.tolerance) for v in present],
        "by_layer": {str(v): compare.by_layer(v, samples, passes, plan.layers) for v in _natural(passes)},
        "terms": compare.terms(samples, passes),
    }


def _natural(passes: Passes) -> list[Variant]:
    """The variants in which routers choose."""
    return [v for v in passes if v.routing == "native"]
