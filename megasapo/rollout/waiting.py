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
    with placed(path) as unfinished, unfinished.open("wb") as f:
        for group in groups:
            f.write(_signed(_encode(group).removeprefix("{").encode()) + b"\n")
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
            uid = record["uid"]
            if uid in prompts:
                found.append(Group(uid, prompts[uid], tuple(_decode_sample(row) for row in record["samples"])))
        if damaged:
            log.warning("%s is damaged: the groups of %d of its lines are sampled again", path, damaged)
    return found


def _signed(rest: bytes) -> bytes:
    """A line: a JSON object of which the first value is the SHA-256 of what follows it."""
    return b'{"sha256": "%s", %s' % (hashlib.sha256(rest).hexdigest().encode(), rest)


def _encode(group: Group) -> str:
    """A JSON object of all but the prompt."""
    return json.dumps({"uid": group.uid, "samples": [_encode_sample(s) for s in group.samples]}, default=_array)


def _encode_sample(sample: Sample) -> dict[str, Any]:
    completion = {name: getattr(sample.completion, name) for name in Completion.__slots__}
    return {"text": sample.text, "reward": sample.reward, "parts": dict(sample.reward_parts), **completion}


def _decode_sample(row: dict[str, Any]) -> Sample:
    text, reward, parts = (row.pop(name) for name in ("text", "reward", "parts"))
    for name in ("logprobs", "routed_experts", "sampled"):
        row[name] = _restore(row[name])
    row["output_ids"] = tuple(row["output_ids"])
    row["version_spans"] = tuple(tuple(span) for span in row["version_spans"])
    return Sample(Completion(**row), text, reward, parts)


def _array(values: np.ndarray) -> dict[str, Any]:
    values = smallest(values) if values.dtype == np.int32 else values  # experts
    data = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
    return {"dtype": values.dtype.str, "shape": list(values.shape), "base64": data}


def _restore(stored: Mapping[str, Any] | None) -> np.ndarray | None:
    if stored is None:
        return None
    flat = np.frombuffer(base64.b64decode(stored["base64"], validate=True), dtype=stored["dtype"])
    values = flat.reshape(stored["shape"]).copy()
    return values.astype(np.int32) if values.dtype.kind in "iu" else values
