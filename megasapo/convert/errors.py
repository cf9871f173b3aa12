"""What goes wrong with a conversion and a user can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megasapo.errors import UserError


class ConvertError(UserError, RuntimeError):
    """A checkpoint cannot be converted or compared; the message names file and tensor and says what to do."""


class WriteError(ConvertError):
    """The disk is full, or a file cannot be written; what has been finished is kept."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """WriteError when what is written inside cannot be: it names the file, or `path` where the system does not say."""
    try:
        yield
    except OSError as e:
        raise WriteError(f"{e.filename2 or e.filename or path}: cannot be written: {e.strerror}") from e
