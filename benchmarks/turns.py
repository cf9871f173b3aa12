"""Two sides of a comparison, each in a process of its own, that take turns: while one runs, the other waits.

learner_step.py and rl_step.py use it. Apart, because megatron-core without CUDA needs patches that the peer must not
see, and because neither side then runs with the other's memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Message = dict[str, Any]


class Turns:
    """What a side holds: `wait` for its turn, then `done` with what it has to say."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def wait(self) -> Message | None:
        """The message that begins the turn; None: there are no more."""
        try:
            return self._pipe.recv()
        except EOFError:
            return None

    def done(self, message: Message) -> None:
        self._pipe.send(message)


class Side:
    """A running process, seen by the one that keeps the order."""

    def __init__(self, name: str, process: Any, pipe: Connection) -> None:
        self.name, self.process, self._pipe = name, process, pipe

    def turn(self, message: Message, timeout_s: float = 600) -> Message:
        """Let it run once. RuntimeError when it ends or says nothing for `timeout_s`."""
        try:
            self._pipe.send(message)
            if self._pipe.poll(timeout_s):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(30)
            raise RuntimeError(f"{self.name} ended with exit code {self.process.exitcode}; see above") from None
        raise RuntimeError(f"{self.name} was silent for {timeout_s} s")

    def stop(self) -> None:
        with contextlib.suppress(ConnectionError):
            self._pipe.send(None)
        self._pipe.close()
        self.process.join(60)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(10)


@contextlib.contextmanager
def sides(workers: dict[str, Callable[[Turns, Any], None]], spec: Any, threads: int) -> Iterator[dict[str, Side]]:
    """Start each worker(turns, spec) in a fresh interpreter with `threads` threads; stop them at the end."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    started: dict[str, Side] = {}
    try:
        for name, worker in workers.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(worker, theirs, spec, threads), name=name)
            process.start()
            theirs.close()
            started[name] = Side(name, process, ours)
        yield started
    finally:
        for side in started.values():
            side.stop()


def _run(worker: Callable[[Turns, Any], None], pipe: Connection, spec: Any, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    worker(Turns(pipe), spec)
