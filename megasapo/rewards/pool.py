"""Runs one grader in worker processes that can be killed, so that a grader that hangs costs its timeout and no more.

Used by model.py from one event loop. Plain functions get a process for each call in progress; an async function gets
one process that many calls share.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import pickle
import sys
from contextlib import suppress
from typing import Any

from megasapo import keys
from megasapo.errors import UserError
from megasapo.rewards.worker import FRAME
from megasapo.types import Prompt

START_TIMEOUT_S = 120.0  # importing what a grader needs, on a busy machine
ASYNC_CALLS = 64  # in progress at once, for an async grader
# An async grader is timed by its own event loop; this much later that loop itself is stuck. One that only gets no turn
# on a busy machine must not be ended, for that fails all calls that share it.
ASYNC_GRACE_S = 20.0
CLOSE_TIMEOUT_S = 2.0


class GraderError(RuntimeError):
    """A grader raised, hung, died, or returned what is not a finite number; scored by reward.on_error."""


class RewardError(UserError, RuntimeError):
    """Grading cannot go on: a grader cannot be loaded, or failed under `on_error: error`. Stops the run."""


class _Worker:
    """One worker process and the calls it has not answered yet."""

    def __init__(self, target: str, process: asyncio.subprocess.Process) -> None:
        self.target = target
        self.process = process
        self.load = 0
        self.alive = True
        self._ids = itertools.count()
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None

    def start_reading(self) -> None:
        self._reader = asyncio.create_task(self._read_answers())

    async def send(self, message: dict[str, Any]) -> None:
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(FRAME.pack(len(body)) + body)
            await self.process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as e:
            raise GraderError(f"{self.target}: its process died") from e

    async def call(self, prompt: Prompt, response: str) -> float:
        request_id = next(self._ids)
        answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = answered
        try:
            await self.send({"id": request_id, "prompt": prompt, "response": response})
            answer = await answered
        finally:
            self._pending.pop(request_id, None)
        if "error" in answer:
            raise GraderError(f"{self.target}: {answer['error']}")
        return float(answer["reward"])

    async def _read_answers(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            answer = json.loads(line)
            waiting = self._pending.get(answer["id"])
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
        self.alive = False
        code = await self.process.wait()
        for waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(GraderError(f"{self.target}: its process ended with exit code {code}"))

    def kill(self) -> None:
        self.alive = False
        if self.process.returncode is None:
            self.process.kill()

    async def close(self) -> None:
        assert self.process.stdin is not None
        if self.load:
            self.kill()
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            self.kill()
            await self.process.wait()
        if self._reader is not None:
            await self._reader


class GraderPool:
    """A types.Reward whose calls run in at most `max_workers` processes, each call at most `timeout_s`.

    Calling it raises GraderError when the grader fails, RewardError when it cannot even be loaded.
    """

    def __init__(self, target: str, options: dict[str, Any], *, timeout_s: float, max_workers: int) -> None:
        self._target, self._options, self._timeout_s = target, options, timeout_s
        self._workers: list[_Worker] = []
        self._starting = asyncio.Lock()
        self._is_async = False
        self._slots = asyncio.Semaphore(max_workers)

    async def start(self) -> None:
        """Start the first worker, which says whether the grader can be loaded and whether it is async."""
        self._workers.append(await self._start_worker())
        if self._is_async:
            self._slots = asyncio.Semaphore(ASYNC_CALLS)

    async def __call__(self, prompt: Prompt, response: str) -> float:
        async with self._slots:  # waiting for a free worker does not count towards the timeout
            worker = await self._take_worker()
            worker.load += 1
            try:
                async with asyncio.timeout(self._timeout_s + (ASYNC_GRACE_S if self._is_async else 0.0)):
                    return await worker.call(prompt, response)
            except TimeoutError as e:
                worker.kill()
                raise GraderError(f"{self._target}: took longer than reward.timeout_s={self._timeout_s}") from e
            except asyncio.CancelledError:
                if not self._is_async:
                    worker.kill()  # it is still busy with a call that nobody waits for
                raise
            finally:
                worker.load -= 1

    async def close(self) -> None:
        workers, self._workers = self._workers, []
        await asyncio.gather(*(w.close() for w in workers))

    async def _take_worker(self) -> _Worker:
        capacity = ASYNC_CALLS if self._is_async else 1
        async with self._starting:
            for dead in [w for w in self._workers if not w.alive]:
                self._workers.remove(dead)
                await dead.close()
            worker = next((w for w in self._workers if w.load < capacity), None)
            if worker is None:
                worker = await self._start_worker()
                self._workers.append(worker)
            return worker

    async def _start_worker(self) -> _Worker:
        path = [os.getcwd(), *(p for p in sys.path if p)]  # graders are found wherever this process would find them
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "megasapo.rewards.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**keys.keyless(), "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        )
        worker = _Worker(self._target, process)
        settings = {"target": self._target, "options": self._options, "timeout_s": self._timeout_s}
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                with suppress(GraderError):  # it died: there will be no line
                    await worker.send(settings)
                line = await process.stdout.readline()
            code = None if line else await process.wait()
            ended = f"reward {self._target}: cannot be loaded: its process ended with exit code {code}"
            answer: dict[str, Any] = json.loads(line) if line else {"error": ended}
            if "error" in answer:
                raise RewardError(answer["error"])
        except BaseException as e:
            worker.kill()  # nobody else knows of it yet
            await worker.close()
            if isinstance(e, TimeoutError):
                raise RewardError(f"reward {self._target}: not ready after {START_TIMEOUT_S} s") from e
            raise
        self._is_async = answer["is_async"]
        worker.start_reading()
        return worker
