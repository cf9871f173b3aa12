"""Writes scored samples to RUN/rollouts/, one file a step, and shows a few of them as text.

Called by train. Files are complete or absent: written beside their name, then renamed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megasapo.placed import placed
from megasapo.types import Group, Sample


def write_rollouts(run_dir: Path, step: int, groups: Sequence[Group], *, shard: tuple[int, int] = (0, 1)) -> Path:
    """RUN/rollouts/step_00000012.jsonl, one sample a line; the path of it.

    `shard` is (index, number of files) where each data-parallel leader writes its own groups: then the name ends in
    .part-I-of-N.jsonl.
    """
    index, num_shards = shard
    suffix = "" if num_shards == 1 else f".part-{index}-of-{num_shards}"
    path = run_dir / "rollouts" / f"step_{step:08d}{suffix}.jsonl"
    with placed(path) as unfinished, unfinished.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, default=str) + "\n" for row in _rows(groups))
    for other in path.parent.glob(f"step_{step:08d}*.jsonl"):  # of an undone step of another layout
        if not other.name.endswith(f"-of-{num_shards}.jsonl") and other != path:
            other.unlink(missing_ok=True)
    return path


def sample_texts(groups: Sequence[Group], num: int) -> dict[str, str]:
    """The first sample of each of the first `num` groups as Markdown, for a sink's texts."""
    return {f"rollouts/{i}": _as_markdown(group) for i, group in enumerate(groups[:num])}


def _rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    for group in groups:
        for index, sample in enumerate(group.samples):
            yield _row(group, index, sample)


def _row(group: Group, index: int, sample: Sample) -> dict[str, Any]:
    completion = sample.completion
    sampled = {} if completion.sampled is None else {"sampled": completion.sampled.astype(int).tolist()}
    return {
        "uid": group.uid,
        "sample": index,
        "prompt_index": group.prompt.index,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "response": sample.text,
        "reward": sample.reward,
        "parts": dict(sample.reward_parts),
        "finish_reason": completion.finish_reason,
        "version_min": completion.version_min,
        "version_max": completion.version_max,
        "version_spans": completion.version_spans,
        "prompt_ids": list(group.prompt.input_ids),
        "output_ids": list(completion.output_ids),
        "logprobs": [float(x) if math.isfinite(x) else None for x in completion.logprobs],
    } | sampled


def _as_markdown(group: Group) -> str:
    sample = group.samples[0]
    heading = f"reward {sample.reward:g}, {sample.completion.finish_reason}, answer {group.prompt.answer}"
    return f"{heading}\n\n{_fenced(group.prompt.text)}\n\n{_fenced(sample.text)}"


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
