"""Bytes that each rank sends in one step, by kind and by link, and how long they take if nothing overlaps.

Called by timing.py. Volumes follow from sizes and degrees; which link carries them from the order of ranks: tp fastest,
then cp, dp, pp; for experts etp fastest, then ep, edp, pp. It knows nothing of FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasapo.config import Config
from megasapo.geometry import Geometry
from megasapo.plan.hardware import ASSUMED, Gpu
from megasapo.plan.memory import DTYPE_BYTES, held_parameters
from megasapo.plan.work import Degrees, Work


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends, inside its node and to others, and the seconds that takes."""

    nvlink: float = 0.0
    network: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.nvlink + other.nvlink, self.network + other.network, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.nvlink * times, self.network * times, self.seconds * times)


@dataclass(frozen=True, slots=True)
class Group:
    """`size` ranks, `stride` apart, on machines of `node` GPUs."""

    size: int
    stride: int
    node: int

    @property
    def per_node(self) -> int:
        """Members on one machine."""
        return min(self.size, max(1, self.node // self.stride))

    def gather(self, total: float, gpu: Gpu) -> Traffic:
        """An all-gather whose result has `total` bytes, or a reduce-scatter whose input has: rings over all members.

        Between machines the members of one share its traffic, each on its own network card.
        """
        if self.size == 1:
            return Traffic()
        network = total * (self.size - self.per_node) / self.size / self.per_node
        return self._traffic(total * (self.size - 1) / self.size - network, network, gpu)

    def exchange(self, each: float, gpu: Gpu) -> Traffic:
        """An all-to-all in which every rank hands out `each` bytes evenly, its own part staying."""
        if self.size == 1:
            return Traffic()
        inside = each * (self.per_node - 1) / self.size
        return self._traffic(inside, each * (self.size - self.per_node) / self.size, gpu)

    def send(self, amount: float, gpu: Gpu) -> Traffic:
        """To the next member; by network when some pair of neighbours is on two machines, which sets the pace."""
        if self.size == 1:
            return Traffic()
        crosses = self.per_node < self.size
        return self._traffic(0.0 if crosses else amount, amount if crosses else 0.0, gpu)

    def _traffic(self, nvlink: float, network: float, gpu: Gpu) -> Traffic:
        seconds = max(nvlink / gpu.nvlink, network / gpu.network) / ASSUMED.link
        return Traffic(nvlink, network, seconds)


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a layout."""

    tp: Group
    cp: Group
    pp: Group
    ep: Group
    etp: Group
    dense: Group  # dp * cp ranks that hold the same dense parameters
    experts: Group  # edp ranks that hold the same experts

    @staticmethod
    def of(degrees: Degrees, node: int) -> Groups:
        d = degrees
        return Groups(
            tp=Group(d.tp, 1, node),
            cp=Group(d.cp, d.tp, node),
            pp=Group(d.pp, d.world // d.pp, node),
            ep=Group(d.ep, d.etp, node),
            etp=Group(d.etp, 1, node),
            dense=Group(d.dp * d.cp, d.tp, node),
            experts=Group(d.edp, d.etp * d.ep, node),
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """One layout of one configuration on one kind of GPU: what messages and seconds are counted for."""

    cfg: Config
    geometry: Geometry
    degrees: Degrees
    work: Work
    gpu: Gpu
    node: int  # GPUs on one machine
    recompute: str

    @property
    def groups(self) -> Groups:
        return Groups.of(self.degrees, self.node)

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return DTYPE_BYTES[self.cfg.model.dtype]

    @property
    def flops(self) -> float:
        return self.gpu.flops / (1 if self.width == 2 else ASSUMED.fp32_slowdown)


def layer_traffic(s: Setting, *, moe: bool, backward: bool) -> dict[str, Traffic]:
    """One layer's forward or backward pass over a micro-batch, by kind."""
    g, d, groups, tokens, gpu, width = s.geometry, s.degrees, s.groups, s.work.mean_micro_tokens, s.gpu, s.width
    states, attended = (groups.tp.gather(tokens / d.cp * size * width, gpu) for size in (g.hidden, g.attention_input))
    # forward: gather before and scatter after; backward: the same in reverse, and the input gathered once more
    before = 2 if backward else 1
    found = {"tp": attended * before + states}
    if not moe or g.shared_ffn:
        found["tp"] += states * (before + 1)
    found["cp"] = groups.cp.gather(tokens * g.kv_width / d.tp * width, gpu)
    if moe:
        routed = tokens / (d.tp * d.cp) * g.top_k * g.hidden * width * ASSUMED.load_imbalance
        found["ep"] = groups.ep.exchange(routed, gpu) * 2
        found["ep"] += groups.etp.gather(routed * d.etp, gpu) * 2
    return found


def step_boundaries(s: Setting) -> Traffic:
    """Hidden states sent on by one rank in one direction for one micro-batch, by all of its chunks."""
    states = s.work.mean_micro_tokens / (s.degrees.tp * s.degrees.cp) * s.geometry.hidden * s.width
    return s.groups.pp.send(states, s.gpu) * s.degrees.vpp


def gradient_traffic(s: Setting) -> Traffic:
    """Of one optimizer step: fp32 gradients scattered, weights gathered; the stage that takes longest."""
    stages = []
    for stage in range(s.degrees.pp):
        held = held_parameters(s.geometry, s.degrees, stage)
        found = Traffic()
        for group, count in ((s.groups.dense, held.dense), (s.groups.experts, held.experts)):
            found += group.gather(count * 4, s.gpu) + group.gather(count * s.width, s.gpu)
        stages.append(found)
    return max(stages, key=lambda t: t.seconds)


def publish_traffic(s: Setting) -> Traffic:
    """Of one publication: all weights to rank 0, and from there over its network card to the servers."""
    total = s.geometry.parameters().total * s.width
    near = min(1.0, s.node / s.degrees.world)
    inside, outside = total * (near - 1 / s.degrees.world), total * (1 - near)
    seconds = (inside / s.gpu.nvlink + (outside + total) / s.gpu.network) / ASSUMED.link
    return Traffic(max(0.0, inside), outside + total, seconds)


def total_traffic(work: Work, per_micro: dict[str, Traffic], per_mini: Traffic, publish: Traffic) -> dict[str, Traffic]:
    """Of one step, from what each micro-batch, optimizer step and publication sends."""
    found = {kind: each * (work.micro_batches * work.mini_batches) for kind, each in per_micro.items()}
    found["dp"] = per_mini * work.mini_batches
    found["publish"] = publish
    return {kind: traffic for kind, traffic in found.items() if traffic.nvlink or traffic.network}
