"""The directory RUN/checkpoints: which checkpoints are complete, undamaged and wanted; no tensor is read here.

Called by mcore/checkpoint.py and mcore/saver.py on rank 0. A checkpoint is a directory `step_XXXXXXXX` with
`megasapo.json`, its record: format, layout, trainer state and the SHA-256 of every other file and of itself. `latest`
names the one to continue from. What ends in `.tmp` is being written or removed; in `.damaged`, set aside; in
`.unstable`, the state that ended a run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megasapo.errors import UserError

log = logging.getLogger(__name__)
RECORD = "megasapo.json"
NAME = re.compile(r"step_\d{8}")
FORMAT = 3
HASHERS = 4  # threads of one process; hashlib and reading let go of Python's lock


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be read or does not fit this run; the message names it and says what to do."""


class Damaged(CheckpointError):
    """A checkpoint is not as it was written."""


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a complete training checkpoint."""
    return (path / RECORD).is_file()


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


# --- records ---


def sha256(paths: Sequence[Path]) -> list[str]:
    """The digests of files, some at a time."""

    def digest(path: Path) -> str:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with ThreadPoolExecutor(HASHERS) as pool:
        return list(pool.map(digest, paths))


def _own_digest(record: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Make a directory a checkpoint, or replace its record at once or not at all."""
    write_durably(path / RECORD, json.dumps({**record, "sha256": _own_digest(record)}, indent=1))


def read_record(path: Path) -> dict[str, Any]:
    """A checkpoint's record. Raises Damaged, and CheckpointError for another format."""
    try:
        record: dict[str, Any] = json.loads((path / RECORD).read_text())
        number, known = record["format"], record.get("sha256")
        if number == FORMAT:
            known = record["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise Damaged(f"{path / RECORD} is damaged ({type(e).__name__}: {e})") from e
    if known is not None and known != _own_digest(record):
        raise Damaged(f"{path / RECORD} is damaged: its SHA-256 is not the recorded one")
    if number != FORMAT:
        raise CheckpointError(
            f"{path} has format {number}, this version reads {FORMAT}: finish the run with the version that "
            "began it, or start another run.name from its exported HF directory (model.path=RUN/hf)"
        )
    return record


def differences(path: Path, files: Mapping[str, str]) -> list[str]:
    """What is wrong with some of a checkpoint's files, given with their digests."""
    there = [name for name in files if (path / name).is_file()]
    problems = [f"{name} is missing" for name in files if name not in there]
    for name, found in zip(there, sha256([path / name for name in there]), strict=True):
        if found != files[name]:
            problems.append(f"{name} has another SHA-256 than when it was written")
    return problems


# --- which one to continue from ---


def complete(folder: Path, below: int | None = None) -> list[Path]:
    """Complete checkpoints (before step `below`) by step, damaged ones among them."""
    named = (path for path in folder.glob("step_*") if NAME.fullmatch(path.name))  # and not step_10_good, a user's copy
    found = sorted(path for path in named if is_checkpoint(path))
    return found if below is None else [path for path in found if step_of(path) < below]


def latest(run_dir: Path) -> Path | None:
    """The checkpoint that `latest` names, or None without one.

    Where that one is gone, the newest complete one before it, with a warning. Raises CheckpointError without any.
    """
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text(errors="replace").strip()
    path = pointer.parent / name
    is_name = NAME.fullmatch(name) is not None
    if is_name and is_checkpoint(path):
        return path
    return _one_before(pointer, step_of(path) if is_name else None, f"{pointer} names {name!r}, which is not complete")


def set_aside(path: Path, problem: str) -> Path:
    """Rename a damaged checkpoint and have `latest` name the newest complete one before it, which is returned.

    Raises CheckpointError when there is none.
    """
    aside = _unused(path, "damaged")
    path.rename(aside)
    pointer = path.parent / "latest"
    before = _one_before(pointer, step_of(path), f"{problem}; it is now {aside.name}")
    write_durably(pointer, before.name)
    return before


def _one_before(pointer: Path, step: int | None, problem: str) -> Path:
    left = complete(pointer.parent, step)
    if not left:
        raise CheckpointError(
            f"{problem}, and no complete checkpoint before it is left: bring one back from a copy and write its name "
            f"into {pointer}, or remove {pointer} to start over"
        )
    log.warning("%s: continuing from %s", problem, left[-1])
    return left[-1]


# --- writing and removing ---


def clear(folder: Path) -> None:
    """Remove what was being written or removed when a process died."""
    for left_over in folder.glob("step_*.tmp"):
        shutil.rmtree(left_over)


def commit(temporary: Path, final: Path, *, point: bool) -> None:
    """Give a finished directory its name, and then have `latest` name it if `point`."""
    before = _discarded(final) if final.exists() else None
    temporary.rename(final)
    sync(final.parent)
    if point:
        write_durably(final.parent / "latest", final.name)
    if before is not None:
        shutil.rmtree(before)


def prune(folder: Path, step: int, *, keep: int, keep_every: int) -> None:
    """Remove all up to `step` but the last `keep` and those of steps that `keep_every` divides (0: none).

    Later ones, if any, are a branch that somebody went back from: not ours to remove.
    """
    for path in complete(folder, step + 1)[:-keep]:
        if not keep_every or step_of(path) % keep_every:
            shutil.rmtree(_discarded(path))


def _discarded(path: Path) -> Path:
    """Renamed first: a directory of which half is removed must not look complete."""
    return path.rename(_unused(path, "old", ".tmp"))


def _unused(path: Path, word: str, end: str = "") -> Path:
    names: Iterable[Path] = (path.with_name(f"{path.name}.{word}{i or ''}{end}") for i in range(1000))
    return next(name for name in names if not name.exists())


def write_durably(path: Path, text: str) -> None:
    """Replace a small file at once, on the disk when this returns."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or a directory's list of files, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
