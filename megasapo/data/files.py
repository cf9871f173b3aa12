"""Reads the records of a JSONL or parquet file and names file and line in every complaint.

Called by prompts.py and sft.py; knows nothing of tokenizers or of what a record means.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from megasapo.errors import UserError

PARQUET_MAGIC = b"PAR1"
EXPECTED = "JSONL (one JSON object a line) or parquet"
ROWS_AT_ONCE = 1024

T = TypeVar("T")


class DataError(UserError, ValueError):
    """A data file is missing or one of its lines is malformed; the message names file, line and what to change."""


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, record), lines counted from 1; for parquet the line is the row. Blank JSONL lines are skipped."""
    if not path.is_file():
        raise DataError(f"{path}: no such data file")
    with path.open("rb") as f:
        is_parquet = f.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    if path.suffix == ".parquet" and not is_parquet:
        raise DataError(f"{path}: not a parquet file, though it is called one")
    yield from _read_parquet(path) if is_parquet else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as f:
        for line, raw in enumerate(f, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark, as some editors write it
            if not raw.strip():
                continue
            try:
                record = json.loads(raw)
            except UnicodeDecodeError as e:
                raise DataError(f"{path}:{line}: not UTF-8 (byte {e.start}): save the file as UTF-8") from e
            except json.JSONDecodeError as e:
                raise DataError(
                    f"{path}:{line}: not valid JSON: {e.msg} at column {e.colno}; {EXPECTED} is read"
                ) from e
            except ValueError as e:  # such as an integer of more digits than Python reads
                raise DataError(f"{path}:{line}: not readable: {e}") from e
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}:{line}: expected a JSON object, found {type(record).__name__}; {EXPECTED} is read"
                )
            yield line, record


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for rows in file.iter_batches():
                for record in rows.to_pylist():
                    line += 1
                    # A column that a row does not have reads as null: the same as a key that is absent in JSONL.
                    yield line, {k: v for k, v in record.items() if v is not None}
    except pyarrow.ArrowException as e:
        raise DataError(f"{path}: not a readable parquet file after row {line}: {e}") from e


def batched(rows: Iterable[T]) -> Iterator[list[T]]:
    """Lists of at most ROWS_AT_ONCE, for what is quicker on many rows than on one."""
    rows = iter(rows)
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        yield batch
