"""Raw expert choices of sampled sequences in RUN/routing/trace: parquet that pandas and pyarrow read by themselves.

train.py adds what it has after each step; report and debugger read with `read_trace`; the rollout source asks
`is_traced`. It knows nothing of how routing is obtained or replayed.

A row is one sequence as one side routed it: step, uid (of the sequence: group uid * G + index in the group), source
("rollout" or "learner"), version_min and version_max (of the weights that routed it), prompt_tokens, tokens (rows of
the routing: row t is of input token t; the last token has none), num_layers, top_k, and experts: the ids, flat,
    np.reshape(row.experts, (row.tokens, row.num_layers, row.top_k))
as uint8 up to 255 experts, else uint16. All K ids 255 (65535): the choice is unknown. The decoder layers that the
num_layers columns are of, and the number of experts, stand as JSON under `megasapo` in each file's metadata.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megasapo.metrics import Metric, Sum
from megasapo.placed import placed
from megasapo.routing.validate import UNKNOWN

log = logging.getLogger(__name__)
FILE_BYTES = 32 << 20  # ids in one file at most, unless one sequence has more
FILE_STEPS = 16  # a file that spans this many steps is finished: a crash loses no more of a small run
QUEUED_BYTES = 512 << 20  # ids that wait to be written at most; whoever adds more waits too
_NAME = re.compile(r"steps_(\d+)-(\d+)\.part-(\d+)\.(\d+)\.parquet")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One sequence as one side routed it."""

    uid: int
    source: Literal["rollout", "learner"]
    version_min: int
    version_max: int
    prompt_tokens: int
    routing: np.ndarray  # [rows, L, K] uint8 or int16, -1 in all K places: unknown


ABOUT = ("uid", "source", "version_min", "version_max", "prompt_tokens")  # columns that are fields of a row


def is_traced(uid: int, rate: float, seed: int) -> bool:
    """Whether a sequence is in the trace: the same answer on every rank, for both sources, and after a resume."""
    drawn = int.from_bytes(hashlib.blake2b(f"{seed}/{uid}".encode(), digest_size=8).digest(), "big")
    return drawn < rate * 2**64


class _BudgetUsed(Exception):
    """A file is more than routing.trace_budget_mb has left."""


class TraceWriter:
    """Writes one rank's share of the trace in a thread of its own; what went wrong there is raised by the next call.

    Files are complete or absent, and named for the steps that they span. `flush` before a checkpoint counts as saved:
    what is still being collected is lost with the process.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rate: float,
        budget_bytes: int,
        layers: Sequence[int],
        num_experts: int,
        top_k: int,
        part: tuple[int, int] = (0, 1),
        seed: int = 0,
        resume_step: int | None = None,
    ) -> None:
        """`layers`: decoder layers of the L columns; `part`: (index, number) of the ranks that write.

        `budget_bytes` bounds all parts' files together, those of earlier starts included. `resume_step`: the last step
        that the run keeps (None: a fresh start); part 0 removes what lies behind it, so every part has to be made
        before any part's first `add` (a collective call between them sees to that).
        """
        self._directory, self._rate, self._seed, self._part = directory, rate, seed, part[0]
        self._shape = (len(layers), top_k)
        self._schema = _schema(layers, num_experts, top_k)
        directory.mkdir(parents=True, exist_ok=True)
        keep = 0 if resume_step is None else resume_step
        if part[0] == 0:
            _cut_after(directory, keep)
        kept = sum(f.path.stat().st_size for f in _files(directory) if f.first <= keep)
        self._left_bytes = max(0, budget_bytes - kept) // part[1]
        self._file_bytes = min(FILE_BYTES, max(1, self._left_bytes // 4))
        self._budget_bytes, self._is_full, self._is_closed = budget_bytes, False, False
        self._dropped = 0
        self._chunk: list[tuple[int, TraceRow]] = []
        self._chunk_bytes = 0
        self._thread = ThreadPoolExecutor(1, "routing-trace")
        self._writing: deque[tuple[int, Future[int]]] = deque()  # bytes and, once written, rows that were left out

    def add(self, *, step: int, sequences: Sequence[TraceRow]) -> None:
        """Write those of `sequences` that are in the sample; steps never decrease. Waits where the writer is behind.

        Keeps the arrays: they must not be changed afterwards. ValueError for a routing of another model.
        """
        if self._is_closed:
            raise RuntimeError(f"the routing trace in {self._directory} is closed")
        while self._writing and self._writing[0][1].done():
            self._settle()
        for row in sequences:
            if row.routing.ndim != 3 or row.routing.shape[1:] != self._shape:
                raise ValueError(
                    f"sequence {row.uid}: routing {list(row.routing.shape)} is not [rows, {self._shape[0]} MoE layers, "
                    f"top-k {self._shape[1]}]"
                )
            if is_traced(row.uid, self._rate, self._seed):
                is_large = self._chunk_bytes + row.routing.nbytes > self._file_bytes
                if self._chunk and (is_large or step - self._chunk[0][0] >= FILE_STEPS):
                    self._send()
                self._chunk.append((step, row))
                self._chunk_bytes += row.routing.nbytes

    def flush(self) -> None:
        """Return when everything added so far is on disk."""
        self._send()
        while self._writing:
            self._settle()

    def close(self) -> None:
        """Write the rest and end the thread. Twice is once."""
        self._is_closed = True
        try:
            self.flush()
        finally:
            self._thread.shutdown()

    def take_metrics(self) -> dict[str, Metric]:
        """routing/trace_dropped: sequences of the sample that the budget left out since the last call."""
        dropped, self._dropped = self._dropped, 0
        return {"routing/trace_dropped": Sum(float(dropped))}

    def _send(self) -> None:
        """Have the thread write what was collected, once no more than QUEUED_BYTES wait for it."""
        size, chunk, self._chunk, self._chunk_bytes = self._chunk_bytes, self._chunk, [], 0
        while self._writing and size + sum(waiting for waiting, _ in self._writing) > QUEUED_BYTES:
            self._settle()
        if chunk:
            self._writing.append((size, self._thread.submit(self._write_file, chunk)))

    def _settle(self) -> None:
        """Wait for the oldest file."""
        _, written = self._writing.popleft()
        try:
            self._dropped += written.result()
        except Exception as e:
            raise RuntimeError(f"the routing trace in {self._directory} cannot be written: {e}") from e

    def _write_file(self, chunk: Sequence[tuple[int, TraceRow]]) -> int:
        """In the thread: one file, unless it is more than the budget has left. Rows left out."""
        if self._is_full:
            return len(chunk)
        stem = f"steps_{chunk[0][0]:08d}-{chunk[-1][0]:08d}.part-{self._part}"
        numbered = (self._directory / f"{stem}.{i:03d}.parquet" for i in itertools.count())  # a step can fill several
        path = next(p for p in numbered if not p.exists())
        try:
            with placed(path) as unfinished:
                size = _write(_table(chunk, self._schema), unfinished)
                if size > self._left_bytes:
                    raise _BudgetUsed
        except _BudgetUsed:
            self._is_full = True
            log.warning(
                "the routing trace in %s ends at step %d: routing.trace_budget_mb=%g is used up; raise it or lower "
                "routing.trace_rate for more",
                self._directory,
                chunk[0][0],
                self._budget_bytes / 2**20,
            )
            return len(chunk)
        except BaseException:
            self._is_full = True  # told once; nothing more is written
            raise
        self._left_bytes -= size
        return 0


def read_trace(directory: Path, step: int | None = None, uid: int | None = None) -> list[tuple[int, TraceRow]]:
    """(step, row) of a trace, or of one step or sequence in it, ordered by step, uid, source and version."""
    found: list[tuple[int, TraceRow]] = []
    wanted = [(name, "=", value) for name, value in (("step", step), ("uid", uid)) if value is not None]
    for file in _files(directory):
        if step is None or file.first <= step <= file.last:
            table = pq.read_table(file.path, filters=wanted or None)
            found += [_row(table, i) for i in range(table.num_rows)]
    return sorted(found, key=lambda item: (item[0], item[1].uid, item[1].source, item[1].version_min))


class _File(NamedTuple):
    path: Path
    first: int  # steps
    last: int  # at most


def _files(directory: Path) -> list[_File]:
    matches = [(path, _NAME.fullmatch(path.name)) for path in sorted(directory.glob("steps_*.parquet"))]
    return [_File(path, int(m[1]), int(m[2])) for path, m in matches if m is not None]


def _cut_after(directory: Path, step: int) -> None:
    """Remove the rows of later steps, and what a killed writer left unfinished.

    A file that loses only some rows keeps its name, so that replacing it is one indivisible step.
    """
    for path in directory.glob(".steps_*.tmp"):
        path.unlink()
    for file in _files(directory):
        if file.first > step:
            file.path.unlink()
        elif file.last > step:
            table = pq.read_table(file.path, filters=[("step", "<=", step)])
            with placed(file.path) as unfinished:
                _write(table, unfinished)


def _schema(layers: Sequence[int], num_experts: int, top_k: int) -> pa.Schema:
    # one id more than there are experts: unknown
    ids = pa.uint8() if num_experts <= 255 else pa.uint16()
    columns = [("step", pa.int32()), ("uid", pa.int64()), ("source", pa.string())]
    columns += [(name, pa.int32()) for name in ("version_min", "version_max", "prompt_tokens", "tokens")]
    columns += [("num_layers", pa.int32()), ("top_k", pa.int32()), ("experts", pa.list_(ids))]
    about = {"layers": [int(layer) for layer in layers], "num_experts": num_experts, "top_k": top_k}
    return pa.schema(columns, metadata={"megasapo": json.dumps(about)})


def _table(chunk: Sequence[tuple[int, TraceRow]], schema: pa.Schema) -> pa.Table:
    id_type = schema.field("experts").type.value_type
    # -1 becomes the largest id of the unsigned type
    flat = [row.routing.reshape(-1).astype(id_type.to_pandas_dtype()) for _, row in chunk]
    offsets = np.cumsum([0, *(len(ids) for ids in flat)], dtype=np.int32)
    rows = [row for _, row in chunk]
    columns = {
        "step": [step for step, _ in chunk],
        **{name: [getattr(row, name) for row in rows] for name in ABOUT},
        "tokens": [len(r.routing) for r in rows],
        "num_layers": [r.routing.shape[1] for r in rows],
        "top_k": [r.routing.shape[2] for r in rows],
        "experts": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(flat))),
    }
    return pa.table(columns, schema=schema)


def _write(table: pa.Table, path: Path) -> int:
    """Bytes on disk. Ids go through parquet's dictionary, which packs each into ceil(log2 E) bits."""
    with path.open("wb") as f:
        pq.write_table(table, f, compression="zstd")
        f.flush()
        os.fsync(f.fileno())
        return f.tell()


def _row(table: pa.Table, number: int) -> tuple[int, TraceRow]:
    ids = table["experts"][number].values.to_numpy()
    values = {name: table[name][number].as_py() for name in table.column_names if name != "experts"}
    unknown = ids == np.iinfo(ids.dtype).max
    if unknown.any() or json.loads(table.schema.metadata[b"megasapo"])["num_experts"] > 256:
        ids = np.where(unknown, UNKNOWN, ids.astype(np.int16))
    else:
        ids = ids.astype(np.uint8)
    routing = ids.reshape(values["tokens"], values["num_layers"], values["top_k"])
    return values["step"], TraceRow(**{name: values[name] for name in ABOUT}, routing=routing)
