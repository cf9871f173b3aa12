"""Groups that were sampled and scored but wait for their step, kept on disk with a checkpoint.

RUN/in_flight/step_00000040[.part-I-of-N].jsonl, a group a line with its SHA-256, written by each data-parallel leader
before the checkpoint of that step is; the checkpoint's own record says which prompts are under way. Called by the
rollout source.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megasapo.placed import placed
from megasapo.routing.validate import smallest
from megasapo.types import Completion, Group, Prompt, Sample

log = logging.getLogger(__name__)


def write(run_dir: Path, step: int, groups: Iterable[Group], *, shard: tuple[int, int]) -> None:
    """This leader's file for the checkpoint of `step`, at once or not at all; files of removed checkpoints go.

    `shard`: index and number of leaders.
    """
    folder, checkpoints = run_dir / "in_flight", run_dir / "checkpoints"
    index, num = shard
    part = "" if num == 1 else f".part-{index}-of-{num}"
    path = folder / f"step_{step:08d}{part}.jsonl"
    with placed(path) as unfinished, unfinished.open("w", encoding="utf-8") as f:
        for rest in (json.dumps(_encode(group)).removeprefix("{") for group in groups):
            f.write(f"{_signed(rest.encode()).decode()}\n")
        f.flush()
        os.fsync(f.fileno())
    for other in folder.glob(f"step_{step:08d}*.jsonl"):  # of a try in another layout, whose checkpoint was lost
        if not other.name.endswith(f"-of-{num}.jsonl" if part else f"{step:08d}.jsonl"):
            other.unlink(missing_ok=True)
    kept = {p.name[:13] for p in checkpoints.glob("step_????????*")}
    before = sorted(p for p in folder.glob(f"step_????????{part}.jsonl") if p.name < path.name)
    for old in before[:-1]:  # the last one's checkpoint may still be on its way
        if old.name[:13] not in kept:
            old.unlink()


def read(run_dir: Path, step: int, prompts: Mapping[int, Prompt]) -> list[Group]:
    """The groups of `prompts`, by uid, that waited at a checkpoint, whichever leader wrote them.

    What is not as it was written is left out, with a warning: its prompts are sampled again.
    """
    found = []
    for path in sorted((run_dir / "in_flight").glob(f"step_{step:08d}*.jsonl")):
        damaged = 0
        for line in path.read_bytes().splitlines():
            if line != _signed(line[len(_signed(b"")) :]):
                damaged += 1
                continue
            record = json.loads(line)
            if record["uid"] in prompts:
                found.append(_decode(record, prompts[record["uid"]]))
        if damaged:
            log.warning("%s is damaged: the groups of %d of its lines are sampled again", path, damaged)
    return found


def _signed(rest: bytes) -> bytes:
    """A line: a JSON object of which the first value is the SHA-256 of what follows it."""
    return b'{"sha256": "%s", %s' % (hashlib.sha256(rest).hexdigest().encode(), rest)


def _encode(group: Group) -> dict[str, Any]:
    return {"uid": group.uid, "samples": [_encode_sample(sample) for sample in group.samples]}


def _encode_sample(sample: Sample) -> dict[str, Any]:
    done = sample.completion
    routed = None if done.routed_experts is None else smallest(done.routed_experts)
    return {
        "text": sample.text,
        "reward": sample.reward,
        "parts": dict(sample.reward_parts),
        "finish_reason": done.finish_reason,
        "version_min": done.version_min,
        "version_max": done.version_max,
        "version_spans": done.version_spans,
        "output_ids": list(done.output_ids),
        "logprobs": _array(done.logprobs),
        "routed_experts": _array(routed),
        "sampled": _array(done.sampled),
    }


def _decode(record: Mapping[str, Any], prompt: Prompt) -> Group:
    return Group(record["uid"], prompt, tuple(_decode_sample(row) for row in record["samples"]))


def _decode_sample(row: Mapping[str, Any]) -> Sample:
    routed = _restore(row["routed_experts"])
    logprobs = _restore(row["logprobs"])
    assert logprobs is not None
    completion = Completion(
        output_ids=tuple(row["output_ids"]),
        logprobs=logprobs,
        finish_reason=row["finish_reason"],
        version_min=row["version_min"],
        version_max=row["version_max"],
        routed_experts=None if routed is None else routed.astype(np.int32),
        version_spans=tuple(tuple(span) for span in row["version_spans"]),
        sampled=_restore(row["sampled"]),
    )
    return Sample(completion, row["text"], row["reward"], row["parts"])


def _array(values: np.ndarray | None) -> dict[str, Any] | None:
    if values is None:
        return None
    data = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
    return {"dtype": values.dtype.str, "shape": list(values.shape), "base64": data}


def _restore(stored: Mapping[str, Any] | None) -> np.ndarray | None:
    if stored is None:
        return None
    flat = np.frombuffer(base64.b64decode(stored["base64"], validate=True), dtype=stored["dtype"])
    return flat.reshape(stored["shape"]).copy()
