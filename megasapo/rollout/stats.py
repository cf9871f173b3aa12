"""What is worth logging about a batch of groups: rewards, lengths, staleness, routing that servers did not return.

Pure; merged over ranks by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megasapo.metrics import Hist, Max, Mean, Metric, Metrics, Sum, merge
from megasapo.routing.validate import unknown_rows
from megasapo.types import Completion, Group, Sample, TrainSequence

REWARD_EDGES = tuple(float(x) for x in np.linspace(-2, 2, 41))
LENGTH_EDGES = (0.0, *(float(x) for x in np.unique(np.round(np.geomspace(1, 131072, 52)))))


def group_stats(groups: list[Group], version: int, dropped: int) -> Metrics:
    """Statistics of this rank's groups for the step that starts from weights `version`.

    reward/std is the mean over groups of the standard deviation inside a group.
    """
    parts: list[Metrics] = [{"groups/dropped": Sum(float(dropped))}]
    for group in groups:
        rewards = group.rewards().astype(np.float64)
        per_group: dict[str, Metric] = {
            "reward/std": Mean(float(rewards.std()), 1.0),
            "groups/zero_variance_frac": Mean(float(np.ptp(rewards) == 0), 1.0),
            "reward/hist": Hist.of(rewards, REWARD_EDGES),
        }
        parts.append(per_group)
        parts += [_sample_stats(sample, len(group.prompt.input_ids), version) for sample in group.samples]
    return merge(parts)


def turns(done: Completion) -> int:
    """Pieces that the engine sampled, between those that an episode added."""
    if done.sampled is None:
        return 1
    return int(np.count_nonzero(np.diff(done.sampled.astype(np.int8), prepend=0) == 1))


def routing_stats(sequences: Sequence[TrainSequence]) -> Metrics:
    """routing/native_frac: of the tokens whose routing was asked for, the share that the server did not say.

    Counted in rows (a token in a MoE layer), so that a token unknown in half of them counts half.
    """
    stats: list[Metrics] = []
    for s in sequences:
        if s.routing is not None:
            slots, layers = len(s.tokens) - 1, s.routing.shape[1]
            stats.append({"routing/native_frac": Mean(unknown_rows(s.routing, len(s.tokens)) / layers, float(slots))})
    return merge(stats)


def _sample_stats(sample: Sample, prompt_tokens: int, version: int) -> Metrics:
    done = sample.completion
    length = float(len(done.output_ids))
    behind = float(version - done.version_min)
    stats: dict[str, Metric] = {
        "reward/mean": Mean(sample.reward, 1.0),
        "rollout/tokens": Sum(prompt_tokens + length),
        "response/length_mean": Mean(length, 1.0),
        "response/length_max": Max(length),
        "response/truncated_frac": Mean(float(done.finish_reason == "length"), 1.0),
        "response/length_hist": Hist.of(np.array([length]), LENGTH_EDGES),
        "response/turns_mean": Mean(float(turns(done)), 1.0),
        "staleness/mean": Mean(behind, 1.0),
        "staleness/max": Max(behind),
    }
    for name, value in sample.reward_parts.items():
        stats[f"reward/{name}"] = Mean(value, 1.0)
    return stats
