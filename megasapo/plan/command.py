"""The command line of `megasapo plan`, and its tables."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from megasapo import config
from megasapo.arguments import Parser
from megasapo.config import Config, ConfigError
from megasapo.geometry import Geometry, read_geometry
from megasapo.plan.hardware import GIB, GPUS
from megasapo.plan.search import Cluster, Plan, Ranking, judge, problems, rank

GUESSED = "time is an estimate (docs/planner.md); parameters, FLOPs, weights, gradients and optimizer state are exact"


def main(argv: list[str]) -> int:
    """Print the plan; 0, or 2 when the configuration's own layout cannot be or does not fit."""
    args = _parser().parse_intermixed_args(argv)  # overrides may also stand last
    cfg = config.load(args.config, args.overrides)
    geometry = read_geometry(cfg.model.path)
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    tokens = args.tokens if args.tokens is not None else max(1, longest // 2)
    if min(args.gpus, args.nodes_of, tokens) < 1 or args.top < 0:
        raise ConfigError(
            f"--gpus {args.gpus}, --nodes-of {args.nodes_of} and --tokens {tokens} must be at least 1, "
            f"--top {args.top} at least 0"
        )
    if tokens > longest:
        raise ConfigError(
            f"--tokens {tokens} is more than data.max_prompt_tokens + rollout.max_new_tokens = {longest}, the longest "
            "sequence; lower it or raise those"
        )
    cluster = Cluster(args.gpus, GPUS[args.gpu], args.nodes_of)
    found = problems(cfg, geometry, cluster)
    own = None if found else judge(cfg, geometry, cluster, tokens, cfg.train.recompute)
    ranking = rank(cfg, geometry, cluster, tokens, args.top) if args.top else None
    if args.json:
        reasons = [p.message for p in found]
        print(json.dumps(_record(args, geometry, cluster, own, reasons, ranking, tokens), indent=1))
    else:
        print(_headline(args, cfg, geometry, tokens))
        if found:
            print("\n".join(["", "this layout cannot be:", *(f"  {p.message}" for p in found)]))
        if own is not None:
            print(_own(own, cluster))
        if ranking is not None:
            print(_ranking(ranking, cluster))
        print(f"\n{GUESSED}")
    return 0 if own is not None and own.fits else 2


def _parser() -> Parser:
    parser = Parser(prog="megasapo plan", description="memory, messages and time of parallel layouts")
    parser.add_config()
    parser.add_argument("--gpus", type=int, required=True, help="ranks of the learner, over all machines")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True)
    parser.add_argument("--nodes-of", type=int, default=8, help="GPUs on one machine (default 8)")
    parser.add_argument("--tokens", type=int, help="mean tokens of a sequence (default: half of the longest)")
    parser.add_argument(
        "--top", type=int, default=10, help="how many of the best layouts to list (default 10; 0: none)"
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    return parser


def _headline(args: argparse.Namespace, cfg: Config, geometry: Geometry, tokens: int) -> str:
    count = geometry.parameters()
    sequences, moe = cfg.rollout.prompts_per_step * cfg.rollout.group_size, sum(geometry.moe_layers)
    parts = f"embedding {_billions(count.embedding)}, head {_billions(count.head)}, dense {_billions(count.dense)}"
    parts += f", experts {_billions(count.experts)}" if count.experts else ""
    return "\n".join(
        [
            f"{cfg.model.path}: {geometry.model_type}, {geometry.layers} layers, {moe} with experts",
            f"parameters {_billions(count.total)} in total, {_billions(count.active)} active ({parts})",
            f"forward {geometry.forward_flops([tokens]) / tokens / 1e9:.2f} GFLOP a token in sequences of {tokens}",
            f"{args.gpus} x {args.gpu}, {args.nodes_of} a machine, {cfg.model.dtype}; a step of {sequences} sequences "
            f"of {tokens} tokens in the mean (--tokens)",
        ]
    )


def _own(plan: Plan, cluster: Cluster) -> str:
    room = cluster.gpu.memory_bytes
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {(plan.memory.total - room) / GIB:.1f} GiB too much"
    work, held = plan.work, plan.held
    lines = [
        "",
        f"layout {_name(plan)}",
        f"  a mini-batch: {work.micro_batches} micro-batches a replica of up to {work.micro_tokens} tokens",
        f"  memory a GPU, stage {plan.stage}: {plan.memory.total / GIB:.1f} of {room / GIB:.0f} GiB, {verdict}; holds "
        f"{_billions(held.dense)} dense and {_billions(held.experts)} expert parameters",
        *_columns((name, f"{size / GIB:.2f} GiB") for name, size in plan.memory.parts().items() if size),
        "  messages a rank and step:                  NVLink      network      seconds",
        *(
            f"    {kind:36} {t.nvlink / GIB:8.2f} GiB {t.network / GIB:8.2f} GiB {t.seconds:8.3f}"
            for kind, t in plan.timing.traffic.items()
        ),
        f"  time a step: about {plan.timing.seconds:.2f} s, model FLOPs utilisation "
        f"{plan.timing.utilisation(cluster.gpus, cluster.gpu):.1%}",
        *_columns((name, f"{s:.3f} s") for name, s in sorted(plan.timing.parts.items(), key=lambda x: -x[1]) if s),
    ]
    return "\n".join(lines)


def _columns(rows: Any) -> list[str]:
    return [f"    {name:36} {value:>12}" for name, value in rows]


def _ranking(ranking: Ranking, cluster: Cluster) -> str:
    names = ("tp", "cp", "pp", "vpp", "dp", "ep", "etp")
    titles = ["#", *names, "recompute", "micro", "GiB", "s/step", "MFU", "bubble", "messages"]
    rows = [titles]
    for number, plan in enumerate(ranking.best, 1):
        degrees, timing = plan.degrees.as_dict(), plan.timing
        messages = sum(timing.parts.get(kind, 0) for kind in ("tp", "cp", "ep", "pp", "dp", "publish"))
        rows.append(
            [
                str(number),
                *(str(degrees[name]) for name in names),
                plan.recompute,
                str(plan.work.micro_batches),
                f"{plan.memory.total / GIB:.0f}",
                f"{timing.seconds:.2f}",
                f"{timing.utilisation(cluster.gpus, cluster.gpu):.0%}",
                f"{timing.parts.get('bubble', 0) / timing.seconds:.0%}",
                f"{messages / timing.seconds:.0%}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = ["", f"layouts that fit: {ranking.fitting}; the fastest {len(ranking.best)}:"]
    lines += ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"dropped {count}: {why}" for why, count in ranking.dropped.items()]
    return "\n".join(lines)


def _record(
    args: argparse.Namespace,
    geometry: Geometry,
    cluster: Cluster,
    own: Plan | None,
    reasons: list[str],
    ranking: Ranking | None,
    tokens: int,
) -> dict[str, Any]:
    count = geometry.parameters()
    record: dict[str, Any] = {
        "gpus": args.gpus,
        "gpu": args.gpu,
        "nodes_of": args.nodes_of,
        "sequence_tokens": tokens,
        "parameters": asdict(count) | {"total": count.total},
        "forward_flops_per_sequence": geometry.forward_flops([tokens]),
        "impossible": reasons,
        "layout": _plan_record(own, cluster) if own else None,
    }
    if ranking is not None:
        record["fitting"], record["dropped"] = ranking.fitting, ranking.dropped
        record["best"] = [_plan_record(plan, cluster) for plan in ranking.best]
    return record


def _plan_record(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    return {
        **plan.degrees.as_dict(),
        "recompute": plan.recompute,
        "fits": plan.fits,
        "worst_stage": plan.stage,
        "held_parameters": asdict(plan.held),
        "memory_bytes": plan.memory.parts() | {"total": plan.memory.total},
        "traffic": {kind: asdict(t) for kind, t in plan.timing.traffic.items()},
        "seconds": plan.timing.seconds,
        "seconds_by_part": plan.timing.parts,
        "mfu": plan.timing.utilisation(cluster.gpus, cluster.gpu),
        "work": asdict(plan.work),
    }


def _name(plan: Plan) -> str:
    degrees = plan.degrees.as_dict()
    sizes = " ".join(f"{name}={degrees[name]}" for name in ("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "edp"))
    return f"{sizes}, recompute {plan.recompute}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e8 else f"{count / 1e6:.2f}M"
