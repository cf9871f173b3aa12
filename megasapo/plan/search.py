"""One layout judged, and all layouts of N GPUs judged, counted and ranked.

Called by the command. Judging never raises for a layout that cannot be: the reason is part of the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megasapo.config import Config
from megasapo.geometry import Geometry
from megasapo.layout import Problem, divisors, layout_problems, token_problems
from megasapo.plan.hardware import Gpu
from megasapo.plan.memory import Held, Memory, held_parameters, worst_stage
from megasapo.plan.timing import Timing, estimate
from megasapo.plan.traffic import Setting
from megasapo.plan.work import Degrees, Work
from megasapo.sections import ParallelConfig

RECOMPUTE = ("none", "selective", "full")
MOST_VIRTUAL = 8  # chunks a stage that are tried


@dataclass(frozen=True, slots=True)
class Cluster:
    gpus: int
    gpu: Gpu
    node: int  # GPUs on one machine


@dataclass(frozen=True, slots=True)
class Plan:
    """A possible layout: what the worst stage's ranks hold, and the time of a step."""

    degrees: Degrees
    recompute: str
    work: Work
    held: Held
    stage: int
    memory: Memory
    timing: Timing
    fits: bool


@dataclass(frozen=True, slots=True)
class Ranking:
    """Layouts that fit, fastest first, and how many were dropped for what."""

    best: list[Plan]
    fitting: int
    dropped: dict[str, int]


def problems(cfg: Config, geometry: Geometry, cluster: Cluster) -> list[Problem]:
    """Why the configuration's own layout cannot be; empty when it can."""
    return [*layout_problems(cfg.parallel, cluster.gpus, geometry), *token_problems(cfg)]


def judge(cfg: Config, geometry: Geometry, cluster: Cluster, sequence_tokens: int, recompute: str) -> Plan:
    """A possible layout's memory and time; `recompute` in place of the configuration's."""
    degrees = Degrees.of(cfg.parallel, cluster.gpus)
    work = Work.of(cfg, degrees, sequence_tokens)
    stage, memory = worst_stage(cfg, geometry, degrees, work, recompute)
    timing = estimate(Setting(cfg, geometry, degrees, work, cluster.gpu, cluster.node, recompute))
    return Plan(
        degrees,
        recompute,
        work,
        held_parameters(geometry, degrees, stage),
        stage,
        memory,
        timing,
        fits=memory.total <= cluster.gpu.memory_bytes,
    )


def rank(cfg: Config, geometry: Geometry, cluster: Cluster, sequence_tokens: int, top: int) -> Ranking:
    """All layouts of the cluster; of each the cheapest recomputation that fits."""
    dropped: Counter[str] = Counter()
    fitting = []
    for parallel in layouts(cluster.gpus, geometry):
        changed = cfg.model_copy(update={"parallel": parallel})
        found = problems(changed, geometry, cluster)
        if found:
            dropped[found[0].kind] += 1
            continue
        if Work.of(changed, Degrees.of(parallel, cluster.gpus), sequence_tokens).idle:
            dropped["fewer sequences than replicas"] += 1
            continue
        plans = (judge(changed, geometry, cluster, sequence_tokens, how) for how in RECOMPUTE)
        chosen = min((p for p in plans if p.fits), key=lambda p: p.timing.seconds, default=None)
        if chosen is None:
            dropped["does not fit in memory"] += 1
        else:
            fitting.append(chosen)
    fitting.sort(key=lambda p: p.timing.seconds)
    return Ranking(fitting[:top], len(fitting), dict(dropped.most_common()))


def layouts(gpus: int, geometry: Geometry) -> Iterator[ParallelConfig]:
    """Every layout whose degrees divide the number of GPUs; expert-tensor parallelism is off or as wide as tensor's."""
    has_experts = any(geometry.moe_layers)
    for tp, cp, pp in product(divisors(gpus), repeat=3):
        if gpus % (tp * cp * pp):
            continue
        stage = gpus // pp
        # a chunk has at least one layer; a virtual degree that leaves none is not worth counting as impossible
        virtual = [v for v in divisors(geometry.layers // pp) if v <= MOST_VIRTUAL] if pp > 1 else [1]
        for etp, vpp in product({1, tp} if has_experts else {1}, virtual or [1]):
            for ep in divisors(stage // etp) if has_experts and stage % etp == 0 else [1]:
                yield ParallelConfig(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, vpp=vpp)
