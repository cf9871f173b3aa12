"""The thread that owns the model: takes jobs, decodes all running sequences together, lets them join and leave.

The HTTP side calls `submit`, `call`, `control` and `abandon`; all else happens on the engine's own thread.
Must not know HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import torch

from megasapo.rollout.local.batch import Batch
from megasapo.rollout.local.sequence import Job, Sequence

T = TypeVar("T")
Call = tuple[Future[Any], Callable[[], Any]]
log = logging.getLogger("megasapo.serve")


class EngineError(RuntimeError):
    """The engine has stopped; the message says why. Nothing can be generated any more."""


class Engine:
    """Continuous batching over one model.

    Jobs and `call`s are taken in order; a `call` waits until nothing runs, unless generation is paused (as SGLang's
    weight updates do). `control` runs between any two steps.
    """

    def __init__(self, batch: Batch, weight_version: str, deterministic: bool) -> None:
        self.batch = batch
        self.weight_version = weight_version
        self.paused = False
        self.failure: str | None = None
        self.crashed = False
        self._deterministic = deterministic
        self._inbox: deque[Job | Call] = deque()
        self._urgent: deque[Call] = deque()
        self._jobs: list[Job] = []
        self._waiting: deque[Sequence] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Fail what is left and end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # From any thread

    def submit(self, job: Job) -> None:
        """Queue a job; its `notify` is called when it is finished (and after every step when it streams)."""
        self._put(self._inbox, job)

    def call(self, fn: Callable[[], T]) -> Future[T]:
        """Run `fn` on the engine thread, after the jobs before it, or at once while paused."""
        future: Future[T] = Future()
        self._put(self._inbox, (future, fn))
        return future

    def control(self, fn: Callable[[], T]) -> Future[T]:
        """Run `fn` on the engine thread before its next step."""
        future: Future[T] = Future()
        self._put(self._urgent, (future, fn))
        return future

    def abandon(self, job: Job) -> None:
        """Abort what is left of a request whose client does not wait for it any more."""
        if not job.finished():
            with suppress(EngineError):  # it has stopped, and all jobs with it
                self.control(lambda: self._abort(job.sequences, "Client disconnected"))

    def _put(self, queue: deque[Any], item: Any) -> None:
        with self._wake:
            if self.failure is not None:
                raise EngineError(self.failure)
            queue.append(item)
            self._wake.notify()

    # On the engine thread, through `control` or `call`

    def num_unfinished(self) -> int:
        """Sequences running, waiting or not yet taken from the inbox."""
        return sum(s.finish is None for job in self._jobs + self._inbox_jobs() for s in job.sequences)

    def num_running(self) -> int:
        return len(self.batch.rows)

    def _inbox_jobs(self) -> list[Job]:
        with self._wake:
            return [item for item in self._inbox if isinstance(item, Job)]

    def abort(self, rid: str = "") -> None:
        """Abort the sequences whose id starts with `rid` (so a batch's too, as SGLang does): without it all of them."""
        jobs = self._jobs + self._inbox_jobs()
        self._abort([s for job in jobs for s in job.sequences if s.rid.startswith(rid)], "Aborted")

    def _abort(self, sequences: list[Sequence], why: str) -> None:
        for s in sequences:
            if s.finish is None:
                s.abort(why)
        self._settle()

    def pause(self, mode: str) -> None:
        """Stop stepping. `abort` finishes everything with partial answers, `retract` gives the KV cache back."""
        if mode == "abort":
            self.abort()
        elif mode == "retract":
            self._retract(len(self.batch.rows))
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    # The loop

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._take():
                    self._step()
            self._fail("the server is shutting down")
        except BaseException as e:
            log.exception("the engine has crashed")
            self.crashed = True
            self._fail(f"the engine has crashed: {type(e).__name__}: {e}")

    def _fail(self, reason: str) -> None:
        with self._wake:
            self.failure = reason
            items = [*self._urgent, *self._inbox]
            self._urgent.clear()
            self._inbox.clear()
        error = EngineError(reason)
        for job in [*self._jobs, *(item for item in items if isinstance(item, Job))]:
            job.notify(error)
        for item in items:
            if not isinstance(item, Job) and item[0].set_running_or_notify_cancel():
                item[0].set_exception(error)

    def _take(self) -> bool:
        """Run control calls and take jobs until there is something to step; False when stopping."""
        while True:
            with self._wake:
                while not self._stopping and (item := self._pop()) is None and not self._steppable():
                    self._wake.wait()
                if self._stopping:
                    return False
            if item is None:
                return True
            if isinstance(item, Job):
                self._jobs.append(item)
                self._waiting.extend(s for s in item.sequences if s.finish is None)
                self._settle()
            else:
                _answer(*item)

    def _steppable(self) -> bool:
        return not self.paused and bool(self.batch.rows or self._waiting)

    def _pop(self) -> Job | Call | None:
        """What comes before the next step, taken out of its queue."""
        if self._urgent:
            return self._urgent.popleft()
        if self.paused:
            call = next((item for item in self._inbox if not isinstance(item, Job)), None)
            if call is not None:
                self._inbox.remove(call)
            return call
        if not self._inbox:
            return None
        isolated = self._deterministic or not isinstance(self._inbox[0], Job)
        return None if isolated and self._jobs else self._inbox.popleft()

    def _step(self) -> None:
        self._admit()
        self.batch.step(self.weight_version)
        self._settle()
        for job in self._jobs:
            if job.stream:
                job.notify(None)

    def _admit(self) -> None:
        """Make room for one more token of every row, then let waiting sequences join, oldest first, while they fit."""
        while not self.batch.can_grow():
            self._retract(1)
        while self._waiting and self.batch.can_admit(self._waiting[0]):
            self.batch.admit(self._waiting.popleft())

    def _retract(self, count: int) -> None:
        """Send the `count` youngest running sequences back to the head of the queue; their cache is recomputed."""
        for s in self.batch.retract(count):
            s.retractions += 1
            self._waiting.appendleft(s)

    def _settle(self) -> None:
        """Drop finished sequences from rows and queue, and tell the jobs that are done."""
        self.batch.drop_finished()
        if any(s.finish is not None for s in self._waiting):
            self._waiting = deque(s for s in self._waiting if s.finish is None)
        done = [job for job in self._jobs if job.finished()]
        if done:
            self._jobs = [job for job in self._jobs if not job.finished()]
            if self._deterministic and not self._jobs:
                self.batch.release()  # the next job starts from an empty cache, whatever ran before it
        with self._wake:
            gone = [item for item in self._inbox if isinstance(item, Job) and item.finished()]
            for job in gone:
                self._inbox.remove(job)
        for job in done + gone:
            job.notify(None)


def _answer(future: Future[Any], fn: Callable[[], Any]) -> None:
    """Run `fn`; what it raises is the caller's, not the engine's, failure."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(fn())
    except Exception as e:
        future.set_exception(e)
