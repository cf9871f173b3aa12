"""The samples of one step as a run dumped them: tokens, the server's logprobs, and where traced the server's experts.

Called by the debugger. It reads RUN/rollouts and RUN/routing/trace, and knows nothing of models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megasapo.config import ConfigError
from megasapo.data.files import DataError, read_records
from megasapo.geometry import Geometry
from megasapo.routing.trace import read_trace

NAME = re.compile(r"step_(\d{8})(?:\.part-\d+-of-\d+)?\.jsonl")


@dataclass(frozen=True, slots=True)
class Dumped:
    """One response and its prompt: n tokens."""

    number: int  # place in the step, by uid, from 0
    uid: int  # TrainSequence.uid
    tokens: np.ndarray  # [n] int32
    prompt_tokens: int
    rollout_logp: np.ndarray  # [n - 1] float32 by predicted token; NaN in the prompt and where the server gave none
    version_min: int
    version_max: int
    routing: np.ndarray | None  # [n - 1, L, K] int16, -1 where unknown; None: not traced

    @property
    def response(self) -> slice:
        """The slots that predict the response."""
        return slice(self.prompt_tokens - 1, None)


def read_samples(run_dir: Path, step: int, *, group_size: int, geometry: Geometry) -> list[Dumped]:
    """All samples of a step in order of uid. ConfigError says which steps there are, or why there are none."""
    files = _files(run_dir)
    if step not in files:
        raise ConfigError(f"{run_dir / 'rollouts'} has no step {step}; it has {_ranges(sorted(files))}")
    experts = _traced(run_dir, step)
    found = [
        _sample(f"{path}:{line}", record, group_size, experts, geometry)
        for path in files[step]
        for line, record in read_records(path)
    ]
    if not found:
        raise ConfigError(f"{files[step][0]} is empty")
    return [replace(sample, number=number) for number, sample in enumerate(sorted(found, key=lambda s: s.uid))]


def _files(run_dir: Path) -> dict[int, list[Path]]:
    files: dict[int, list[Path]] = {}
    for path in sorted((run_dir / "rollouts").glob("step_*.jsonl")):
        if found := NAME.fullmatch(path.name):
            files.setdefault(int(found[1]), []).append(path)
    if not files:
        raise ConfigError(f"{run_dir / 'rollouts'} is empty: the run needs log.keep_rollouts=true to keep its samples")
    return files


def _traced(run_dir: Path, step: int) -> dict[int, np.ndarray]:
    """[rows, L, K] of each traced uid, as the server routed it."""
    directory = run_dir / "routing" / "trace"
    if not directory.is_dir():
        return {}
    return {row.uid: row.routing for _, row in read_trace(directory, step=step) if row.source == "rollout"}


def _sample(
    where: str, record: dict[str, Any], group_size: int, experts: dict[int, np.ndarray], geometry: Geometry
) -> Dumped:
    try:
        uid = int(record["uid"]) * group_size + int(record["sample"])
        prompt, response, given = record["prompt_ids"], record["output_ids"], record["logprobs"]
        tokens = np.array([*prompt, *response], dtype=np.int32)
        logp = np.full(len(tokens) - 1, np.nan, dtype=np.float32)
        if not prompt or len(given) != len(response):
            raise ValueError(f"{len(prompt)} prompt_ids, {len(response)} output_ids and {len(given)} logprobs")
        sampled = record.get("sampled", [1] * len(given))  # what an episode added has no logprob
        known = (x if own and x is not None else np.nan for x, own in zip(given, sampled, strict=True))
        logp[len(prompt) - 1 :] = list(known)
        versions = int(record["version_min"]), int(record["version_max"])
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{where}: not a sample as a run dumps it: {type(e).__name__}: {e}") from e
    if tokens.min() < 0 or tokens.max() >= geometry.vocab:
        raise DataError(f"{where}: token ids up to {tokens.max()}, and the model has {geometry.vocab}")
    routing = experts.get(uid)
    if routing is not None:
        routing = _all_slots(routing, len(tokens) - 1, f"trace of sample {uid}", geometry)
    return Dumped(0, uid, tokens, len(prompt), logp, *versions, routing)


def _all_slots(routing: np.ndarray, slots: int, where: str, geometry: Geometry) -> np.ndarray:
    """With -1 for the rows at the end that the server did not return."""
    layers, k = sum(geometry.moe_layers), geometry.top_k
    if routing.shape[1:] != (layers, k) or len(routing) > slots:
        raise DataError(
            f"{where} has shape {list(routing.shape)}: expected at most {slots} tokens, {layers} MoE layers and {k} "
            "experts; was the run started with another model?"
        )
    whole = np.full((slots, layers, k), -1, dtype=np.int16)
    whole[: len(routing)] = routing
    return whole


def choose(samples: list[Dumped], *, number: int | None, uid: int | None, limit: int) -> list[Dumped]:
    """The sample asked for, or the first `limit` of them."""
    if number is None and uid is None:
        return samples[:limit]
    found = [s for s in samples if s.number == number or s.uid == uid]
    if not found:
        asked = f"sample {number}" if uid is None else f"uid {uid}"
        uids = _ranges([s.uid for s in samples])
        raise ConfigError(f"the step has no {asked}: it has samples 0 to {len(samples) - 1}, with uids {uids}")
    return found


def _ranges(numbers: list[int]) -> str:
    """1-4, 7, 10-20."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
