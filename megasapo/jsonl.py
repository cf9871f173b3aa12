"""Files of one JSON object a line, whose last line a kill may have torn: added to, shortened, read as far as whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megasapo.errors import UserError
from megasapo.placed import placed

Row = dict[str, Any]


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows; on disk when it returns."""
    with path.open("a", encoding="utf-8") as f:
        f.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        f.flush()
        os.fsync(f.fileno())


def keep(path: Path, wanted: Callable[[Row], bool]) -> None:
    """Leave only the rows that are wanted; on disk when it returns. No file: nothing."""
    if path.exists():
        rows = [row for row in read(path) if wanted(row)]
        with placed(path) as unfinished:
            append(unfinished, rows)


def read(path: Path, last_bytes: int | None = None) -> list[Row]:
    """All whole rows, or those in the last bytes; no file has none. UserError names what is no object."""
    if not path.exists():
        return []
    with path.open("rb") as f:
        start = 0 if last_bytes is None else max(0, f.seek(0, os.SEEK_END) - last_bytes)
        f.seek(start)
        lines = f.read().splitlines(keepends=True)[start > 0 :]
    whole = enumerate((line for line in lines if line.endswith(b"\n")), start=1)
    return [parse(line, path if start else f"{path}:{number}") for number, line in whole]


def parse(text: bytes, where: Path | str) -> Row:
    """An object of a file that is written so that a kill cannot spoil it. UserError: something else did."""
    try:
        row = json.loads(text)
    except ValueError as e:
        raise UserError(f"{where}: not JSON: {text[:80]!r}; repair or remove it") from e
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {text[:80]!r}")
    return row
