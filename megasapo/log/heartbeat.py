"""Signs of life: every rank keeps RUN/logs/ranks/rank_N.json, which says what it is doing and since when.

Made by train.py and sft.py before the ranks meet, so that one who waits for the others is seen; read by watch.py. A
thread writes it, which tells a rank that waits (fresh, long in one phase) from one that is gone (not written any more).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from megasapo.launch import Place
from megasapo.placed import placed

log = logging.getLogger(__name__)
SHORTEST_S = 1.0  # between two writes: file systems of clusters dislike many small ones
LONGEST_S = 5.0
BETWEEN = "other"  # the phase outside all phases


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Replace a small file in one move: a reader sees the old or the new one, whole."""
    with placed(path) as unfinished:
        unfinished.write_text(json.dumps(record))


class Heartbeat:
    """Context of a rank's whole life. `at` begins a step, `phase(name)` a part of it; both only set what is written."""

    def __init__(self, run_dir: Path, place: Place) -> None:
        self._path = run_dir / "logs" / "ranks" / f"rank_{place.rank}.json"
        now = time.time()
        self._record: dict[str, Any] = {
            **{"rank": place.rank, "world": place.world_size, "host": place.host, "pid": os.getpid()},
            **{"job": place.job, "attempt": place.attempt, "started": now, "state": "running", "error": ""},
            **{"step": None, "total": None, "phase": "start", "since": now},
        }
        self._changed, self._ending, self._warned = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def at(self, step: int, total: int) -> None:
        """Work on step `step` of `total` begins."""
        self._set(step=step, total=total)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Until it ends, the rank is in phase `name`."""
        self._set(phase=name, since=time.time())
        yield
        self._set(phase=BETWEEN, since=time.time())

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ending.set()
        self._changed.set()
        self._thread.join()
        self._set(state="ended") if kind is None else self._set(state="failed", error=f"{kind.__name__}: {error}")
        self._write()

    def _set(self, **changes: Any) -> None:
        self._record = self._record | changes  # a new one: the thread may be reading the old
        self._changed.set()

    def _beat(self) -> None:
        while not self._ending.is_set():
            self._changed.clear()
            self._write()
            if not self._ending.wait(SHORTEST_S):
                self._changed.wait(LONGEST_S - SHORTEST_S)

    def _write(self) -> None:
        try:
            write_json(self._path, self._record | {"written": time.time()})
        except OSError as e:  # a file system that is full or slow to answer must not end the run
            if not self._warned:
                log.warning("no sign of life in %s: %s", self._path, e)
            self._warned = True
        else:
            self._warned = False
