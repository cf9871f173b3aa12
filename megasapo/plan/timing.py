"""An estimate of how long one step takes in one layout: products, attention, memory traffic, messages, bubble.

Called by search.py. FLOPs are exact (geometry.py), seconds rest on the factors in hardware.py; nothing overlaps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megasapo.plan.hardware import ASSUMED, Gpu
from megasapo.plan.memory import held_parameters, layer_counts, layer_saved_bytes
from megasapo.plan.traffic import (
    Setting,
    Traffic,
    gradient_traffic,
    layer_traffic,
    publish_traffic,
    step_boundaries,
    total_traffic,
)

Pass = dict[str, float]  # seconds of one micro-batch in one stage, by what they go into


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one step of the learner (generation is the servers'), and what is in them."""

    seconds: float
    parts: dict[str, float]
    traffic: dict[str, Traffic]
    model_flops: float  # of the update, forward and backward, all ranks

    def utilisation(self, world: int, gpu: Gpu) -> float:
        """Model FLOPs utilisation of the whole step."""
        return self.model_flops / (self.seconds * world * gpu.flops)


def estimate(s: Setting) -> Timing:
    """One step: old logprobs (and the reference's), every mini-batch's forward, backward and update, publication."""
    forwards = [_stage_pass(s, stage, backward=False) for stage in range(s.degrees.pp)]
    backwards = [_stage_pass(s, stage, backward=True) for stage in range(s.degrees.pp)]
    boundary = step_boundaries(s)
    slowest = max(range(s.degrees.pp), key=lambda i: sum([*forwards[i][0].values(), *backwards[i][0].values()]))
    forward, backward = forwards[slowest], backwards[slowest]
    all_but_first = 1 - 1 / s.work.mini_batches  # of the mini-batches have a pass for old logprobs
    only_forward = all_but_first * (s.cfg.algo.old_logprobs == "learner") + bool(s.cfg.algo.kl_coef)

    per_micro: dict[str, Traffic] = {"pp": boundary * (2 + only_forward)}
    parts: Pass = {"pp": per_micro["pp"].seconds}
    for times, (seconds, traffic) in ((1 + only_forward, forward), (1, backward)):
        for kind, amount in seconds.items():
            parts[kind] = parts.get(kind, 0.0) + times * amount
        for kind, moved in traffic.items():
            per_micro[kind] = per_micro.get(kind, Traffic()) + moved * times
    micro = s.work.micro_batches * s.work.mini_batches
    whole = {kind: amount * micro for kind, amount in parts.items() if amount}
    bubbles = s.work.mini_batches * (s.degrees.pp - 1) / s.degrees.vpp
    whole["bubble"] = sum(parts.values()) * bubbles
    gradients, publish = gradient_traffic(s), publish_traffic(s)
    whole["dp"] = gradients.seconds * s.work.mini_batches
    whole["optimizer"] = _optimizer_seconds(s) * s.work.mini_batches
    whole["publish"] = publish.seconds
    lengths = [s.work.sequence_tokens] * s.work.sequences
    return Timing(
        seconds=sum(whole.values()),
        parts=whole,
        traffic=total_traffic(s.work, per_micro, gradients, publish),
        model_flops=float(s.geometry.training_flops(lengths)),
    )


def _stage_pass(s: Setting, stage: int, *, backward: bool) -> tuple[Pass, dict[str, Traffic]]:
    """One micro-batch through one stage: seconds and messages. Recomputation counts as backward."""
    seconds: Pass = {}
    traffic: dict[str, Traffic] = {}
    ways = [True, False] if backward and s.recompute == "full" else [backward]
    for moe, layers in layer_counts(s.geometry, s.degrees, stage).items():
        for way in ways:
            for kind, amount in _layer_seconds(s, moe, backward=way).items():
                seconds[kind] = seconds.get(kind, 0.0) + layers * amount
            for kind, message in layer_traffic(s, moe=moe, backward=way).items():
                traffic[kind] = traffic.get(kind, Traffic()) + message * layers
        if backward and s.recompute == "selective":
            seconds["attention"] += layers * _layer_seconds(s, moe, backward=False)["attention"]
    if stage == s.degrees.pp - 1:
        flops = 2 * s.geometry.vocab * s.geometry.hidden * s.work.mean_micro_tokens / (s.degrees.tp * s.degrees.cp)
        seconds["head"] = flops * (3 if backward else 1) / (s.flops * ASSUMED.gemm)  # logits are computed again
        states = s.work.mean_micro_tokens / s.degrees.cp * s.geometry.hidden * s.width
        traffic["tp"] = traffic["tp"] + s.groups.tp.gather(states, s.gpu) * (2 if backward else 1)
    for kind, message in traffic.items():
        seconds[kind] = message.seconds
    return seconds, traffic


def _layer_seconds(s: Setting, moe: bool, *, backward: bool) -> Pass:
    """Computing time of one layer for one micro-batch."""
    g, times = s.geometry, 2 if backward else 1
    own = s.work.mean_micro_tokens / (s.degrees.tp * s.degrees.cp)
    weights = g.attention_matrix + (g.router + g.shared_expert if moe else g.dense_mlp)
    held = (weights - g.attention_whole) / s.degrees.tp + g.attention_whole
    found = {"dense": max(2 * weights * own * times / (s.flops * ASSUMED.gemm), _weights_seconds(s, held, backward))}
    if moe:
        flops = 2 * g.top_k * g.expert * own * times * (ASSUMED.load_imbalance if s.degrees.ep > 1 else 1.0)
        held = g.experts / s.degrees.ep * g.expert / s.degrees.etp
        found["experts"] = max(flops / (s.flops * ASSUMED.grouped_gemm), _weights_seconds(s, held, backward))
    pairs = own * (s.work.sequence_tokens + 1) / 2
    efficiency = ASSUMED.attention_backward / ASSUMED.attention_backward_work if backward else ASSUMED.attention_forward
    found["attention"] = pairs * g.pair_flops / g.layers / (s.flops * efficiency)
    saved = layer_saved_bytes(
        g, s.degrees, s.work.mean_micro_tokens, moe=moe, dtype=s.cfg.model.dtype, recompute="none"
    )
    found["element-wise"] = saved * times * ASSUMED.element_wise_passes / (s.gpu.hbm * ASSUMED.hbm)
    return found


def _weights_seconds(s: Setting, held: float, backward: bool) -> float:
    """The least that a pass takes: weights read from memory, in backward also their fp32 gradient read and written."""
    return held * (s.width + (8 if backward else 0)) / (s.gpu.hbm * ASSUMED.hbm)


def _optimizer_seconds(s: Setting) -> float:
    """Gradients zeroed and read whole, this rank's shard of state read and written."""
    stages = []
    for stage in range(s.degrees.pp):
        held = held_parameters(s.geometry, s.degrees, stage)
        shard = held.dense / (s.degrees.dp * s.degrees.cp) + held.experts / s.degrees.edp
        stages.append(2 * 4 * held.total + 2 * 12 * shard)
    return max(stages) / (s.gpu.hbm * ASSUMED.hbm)
