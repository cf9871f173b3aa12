"""Files that are complete or absent: written under another name, then moved into their place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megasapo.errors import ConfigError, UserError


class Unwritable(UserError, OSError):
    """A file cannot be written, as on a full disk; the message names it."""


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` once the block has ended without an error. Makes the directory.

    Raises Unwritable for any OSError, so do nothing in the block but write.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as e:
        raise unwritable(path, e) from e


def unwritable(path: Path, error: OSError) -> Unwritable:
    """What to raise where `path` could not be written."""
    return Unwritable(f"{path} cannot be written: {error.strerror or error}; make room there, or write elsewhere")


def refuse_unwritable(path: Path | None, name: str) -> None:
    """Say before the work, not after it, that its result could not be written to `path`, which option `name` gives.

    Makes the directory. Raises ConfigError.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{name} {path} is a directory: name a file, such as {path / 'out'}")
    refuse_unwritable_directory(path.parent, f"{name} {path}")


def refuse_unwritable_directory(directory: Path, what: str) -> None:
    """The same of what is to be made in a directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as e:
        raise ConfigError(f"{what}: cannot write there: {e}") from e
