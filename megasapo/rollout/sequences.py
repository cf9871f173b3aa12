"""From scored groups to the sequences that the learner trains on: advantages, loss masks, routing. Pure numpy."""

from __future__ import annotations

import numpy as np

from megasapo.algo.advantages import group_advantages, overlong_penalty
from megasapo.algo.settings import ResolvedAlgo
from megasapo.routing.validate import RoutingRule, validate
from megasapo.types import Completion, Group, TrainSequence


def to_sequences(groups: list[Group], algo: ResolvedAlgo, routing: RoutingRule | None = None) -> list[TrainSequence]:
    """One sequence a sample, uid = group uid * G + index in the group; trained on is what the engine sampled.

    `routing`: that of the model, where servers were asked for it; RoutingError for one that cannot be right.
    """
    return [sequence for group in groups for sequence in _group_sequences(group, algo, routing)]


def _group_sequences(group: Group, algo: ResolvedAlgo, routing: RoutingRule | None) -> list[TrainSequence]:
    lengths = np.array([len(s.completion.output_ids) for s in group.samples])
    penalty = overlong_penalty(lengths, max_new_tokens=algo.max_new_tokens, penalty_tokens=algo.overlong_penalty_tokens)
    advantages = group_advantages(group.rewards() + penalty, algo.advantage, eps=algo.advantage_eps)
    prompt = group.prompt.input_ids
    sequences = []
    for i, (sample, advantage) in enumerate(zip(group.samples, advantages, strict=True)):
        tokens = np.array([*prompt, *sample.completion.output_ids], dtype=np.int32)
        sampled, response = sample.completion.sampled, slice(len(prompt), None)
        mask = np.zeros(len(tokens), dtype=bool)
        mask[response] = True if sampled is None else sampled
        logp = np.zeros(len(tokens), dtype=np.float32)
        logp[response] = sample.completion.logprobs
        uid = group.uid * len(group.samples) + i
        routed = _routing(sample.completion, len(tokens), routing, f"sample {uid} (group {group.uid}, response {i})")
        sequences.append(TrainSequence(uid, tokens, mask, logp, float(advantage), routed))
    return sequences


def _routing(completion: Completion, tokens: int, rule: RoutingRule | None, where: str) -> np.ndarray | None:
    if rule is None or completion.routed_experts is None:
        return None
    return validate(completion.routed_experts, tokens=tokens, rule=rule, where=where)
