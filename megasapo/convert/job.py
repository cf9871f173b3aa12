"""One conversion on disk: what is finished, so that a killed one goes on, and the target, complete or absent.

Everything is written into `.NAME.converting` beside the target: `files/`, which becomes the target, and `records/`, one
a finished file. Called by command.py. It knows files and their hashes, nothing of tensors.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from megasapo.checkpoints import sha256, sync
from megasapo.convert.errors import ConvertError, WriteError, writing


class Output(NamedTuple):
    """A file that a conversion writes."""

    name: str
    nbytes: int  # of the tensors in it


@dataclass(frozen=True, slots=True)
class Folder:
    """Where the files of a conversion come to be. Used by every process that writes some of them."""

    path: Path

    @property
    def files(self) -> Path:
        return self.path / "files"

    def unfinished(self, name: str) -> Path:
        """Where a file is while it is written: of this process alone."""
        return self.files / f"{name}.{os.getpid()}.part"

    def finish(self, name: str, contents: Any) -> None:
        """A file is written in full: give it its name, and a record with its hash. `contents` is kept beside it."""
        part = self.unfinished(name)  # not yet brought to disk: its hash tells whether it is whole
        record = {"bytes": part.stat().st_size, "sha256": sha256([part])[0], "contents": contents}
        part.rename(self.files / name)
        told = self.path / "records" / f"{name}.{os.getpid()}.part"
        told.write_text(json.dumps(record))
        told.rename(self._record(name))

    def is_finished(self, name: str) -> bool:
        """Whether a file is there and as it was written."""
        path = self.files / name
        try:
            record = self.told(name)
        except (FileNotFoundError, ValueError):  # never written, or cut short when the machine stopped
            return False
        return path.is_file() and path.stat().st_size == record["bytes"] and sha256([path])[0] == record["sha256"]

    def told(self, name: str) -> dict[str, Any]:
        """What was recorded of a finished file: its bytes, its hash and its `contents`."""
        record: dict[str, Any] = json.loads(self._record(name).read_text())
        return record

    def _record(self, name: str) -> Path:
        return self.path / "records" / f"{name}.json"


class Job:
    """The conversion into `target`, as a context: only one at a time, the second is refused.

    `identity` says what it makes of what; a folder that an earlier one of the same identity left is gone on with.
    """

    def __init__(self, target: Path, identity: dict[str, Any]) -> None:
        self._target, self._identity = target.resolve(), json.dumps(identity, sort_keys=True, indent=1)
        self._refuse_existing()
        self.folder = Folder(self._target.with_name(f".{self._target.name}.converting"))

    def __enter__(self) -> Job:
        with writing(self.folder.path):
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._lock.close()
            raise ConvertError(f"another conversion into {self._target} is running: wait for it, or stop it") from e
        try:
            self._refuse_existing()  # one that another has made since
        except ConvertError:
            self._leave()
            raise
        with writing(self.folder.path / "identity.json"):
            self._begin()
        return self

    def _refuse_existing(self) -> None:
        """ConvertError for a target that the finished directory could not take the place of."""
        if self._target.exists() and not (self._target.is_dir() and not any(self._target.iterdir())):
            raise ConvertError(f"{self._target} exists: remove it, or name another directory")
        if self._target.is_mount():
            raise ConvertError(
                f"{self._target}: a file system is mounted there, whose place no directory can take: name one inside it"
            )

    def _begin(self) -> None:
        told = self.folder.path / "identity.json"
        if not told.is_file() or told.read_text() != self._identity:
            if told.is_file():
                print(f"{self.folder.path}: left by another conversion, removed")
            for name in ("files", "records"):
                shutil.rmtree(self.folder.path / name, ignore_errors=True)
            told.write_text(self._identity)
        for name in ("files", "records"):
            (self.folder.path / name).mkdir(exist_ok=True)

    def finished(self, outputs: Sequence[Output]) -> list[Output]:
        """Those that an earlier start has written in full; whatever else it has left is removed."""
        kept = [output for output in outputs if self.folder.is_finished(output.name)]
        names = {output.name for output in kept}
        for left in self.folder.files.iterdir():
            if left.name not in names:
                left.unlink()
        return kept

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self.folder.files.exists() or not any(self.folder.files.iterdir()):
            shutil.rmtree(self.folder.path, ignore_errors=True)  # nothing to go on with
        self._lock.close()

    def check_space(self, outputs: Sequence[Output]) -> None:
        """Refuse to begin what the disk cannot hold."""
        needed = sum(output.nbytes for output in outputs)
        free = shutil.disk_usage(self.folder.path).free
        if needed > free:
            raise WriteError(f"{self._target}: {needed / 1e9:.3f} GB are to be written and {free / 1e9:.3f} are free")

    def put_in_place(self) -> None:
        """The target is there, in full, from one moment to the next."""
        with writing(self._target):
            for path in self.folder.files.iterdir():
                sync(path)
            sync(self.folder.files)
            self.folder.files.rename(self._target)
            sync(self._target.parent)


def fingerprint(directory: Path) -> list[list[Any]]:
    """Names, sizes and times of a directory's files: whether a source is still the one that was begun with."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
