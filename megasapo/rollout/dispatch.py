"""Requests to the fleet's servers: where each goes, again where it fails, twice where it takes too long.

The fleet owns it. All of it runs in the event loop that calls `generate`, but for `lost`. It knows nothing of processes
and weights, only which servers are ready and which versions are allowed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megasapo.keys import Keys
from megasapo.rollout.client import ServerClient, retrying
from megasapo.rollout.limits import ModelLimits
from megasapo.rollout.protocol import BadAnswer, Retryable, RolloutError, WrongVersion, check_versions
from megasapo.rollout.servers import Server
from megasapo.rollout.transcript import to_the_end
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams

log = logging.getLogger(__name__)
SAY_EVERY_S = 5.0  # at most one line about the failures of a server
OLDEST_AFTER = 1000  # collections of the middle generation before one of the oldest; python's own: 10
OTHER_FILES = 512  # beside the connections of requests
AVOID_S = 1.0  # a server that failed this short a time ago is asked only when most others did, too


@dataclass(slots=True)
class SamePrompt:
    """Requests with one prompt, whose cache they share: those of a group."""

    tokens: int = 0  # outstanding at most, all together
    home: Server | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One request, for one or more prompts."""

    input_ids: list[tuple[int, ...]]
    sampling: list[SamplingParams]
    routed: bool
    oldest: int | None  # version: what is asked for now is trained on at most max_staleness versions from now
    kin: SamePrompt

    @property
    def tokens(self) -> int:
        """Outstanding at most."""
        return sum(len(ids) + s.max_new_tokens for ids, s in zip(self.input_ids, self.sampling, strict=True))


class Dispatch:
    """See the module. `newest` says which version the learner has published last; `check` raises what ends the run."""

    def __init__(
        self,
        cfg: RolloutConfig,
        servers: list[Server],
        limits: ModelLimits,
        keys: Keys,
        leader_index: int,
        *,
        newest: Callable[[], int | None],
        check: Callable[[], None],
    ) -> None:
        self._cfg, self._servers, self._limits, self._keys, self._leader = cfg, servers, limits, keys, leader_index
        # who is asked; a router says of no request who has it
        self._asked = servers if cfg.router is None else [Server(index=0, url=cfg.router)]
        self._newest, self._check = newest, check
        if not cfg.repeatable:
            _allow_connections(cfg.max_in_flight)
        self._counts: dict[str, float] = {}
        self._said: dict[str, tuple[float, int]] = {}  # of each server when a failure was logged last, and those since
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clients: list[ServerClient] = []
        self._slots: asyncio.Semaphore | None = None
        self._aborting: set[asyncio.Task[None]] = set()

    async def generate(
        self, input_ids: list[tuple[int, ...]], sampling: list[SamplingParams], *, routed: bool
    ) -> list[Completion]:
        """One completion for each prompt, in order; see Fleet.generate."""
        self._limits.check(input_ids, sampling)
        self._enter_loop()
        if not input_ids:
            return []
        oldest = self._newest()
        if self._cfg.repeatable:
            return await self._request(Job(input_ids, sampling, routed, oldest, SamePrompt()))
        by_prompt: dict[tuple[int, ...], SamePrompt] = {}
        jobs = []
        for ids, s in zip(input_ids, sampling, strict=True):
            jobs.append(Job([ids], [s], routed, oldest, by_prompt.setdefault(ids, SamePrompt())))
            by_prompt[ids].tokens += jobs[-1].tokens
        tasks = [asyncio.create_task(self._one(job)) for job in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def close(self) -> None:
        """Close the connections, in the event loop that used them."""
        self._loop = None
        await asyncio.gather(*self._aborting)
        for client in self._clients:
            await client.close()

    def lost(self, server: Server) -> None:
        """Whoever waits for this server looks elsewhere. From any thread."""
        loop = self._loop  # which `close` may take away at any moment
        if loop is None or loop.is_closed() or self._cfg.router is not None:
            return
        asyncio.run_coroutine_threadsafe(self._clients[server.index].close(), loop)

    def take_counts(self) -> dict[str, float]:
        """Retries by cause and hedges since the last call."""
        counts, self._counts = self._counts, {}
        return counts

    async def _one(self, job: Job) -> Completion:
        assert self._slots is not None
        async with self._slots:
            return await to_the_end(
                lambda ids, sampling: self._request(replace(job, input_ids=ids, sampling=sampling)),
                job.input_ids[0],
                job.sampling[0],
            )

    async def _request(self, job: Job) -> list[Completion]:
        where = ""

        async def attempt() -> list[Completion]:
            nonlocal where
            self._check()
            where = ""
            server = self._home(job)
            where = server.url
            if self._cfg.hedge_after_s is None or len(job.input_ids) > 1:
                return await self._ask(job, server)
            return await self._hedged(job, server, self._cfg.hedge_after_s)

        what = f"a request of {len(job.input_ids)} prompts"
        return await retrying(
            attempt, what=what, for_s=self._cfg.retry_for_s, on_retry=lambda e: self._count_retry(e, where)
        )

    async def _ask(self, job: Job, server: Server, rid: str | None = None) -> list[Completion]:
        """One attempt at one server, whose answer is checked."""
        rule = self._limits.routing_rule() if job.routed else None
        server.outstanding_tokens += job.tokens
        try:
            completions = await self._clients[server.index].generate(
                job.input_ids, job.sampling, routed=rule, rid=rid, partial=self._cfg.on_publish == "abort"
            )
            self._check_versions(completions, job.oldest, server)
        except Retryable:
            server.failed_at, server.suspect = time.monotonic(), True
            raise
        finally:
            server.outstanding_tokens -= job.tokens
        server.suspect = False
        return completions

    async def _hedged(self, job: Job, server: Server, after_s: float) -> list[Completion]:
        """Ask a second server too when the first has not answered after `after_s`; the first good answer is the only
        one, and the other request is aborted.
        """
        tries: dict[asyncio.Task[list[Completion]], tuple[Server, str]] = {}

        def start(at: Server) -> None:
            rid = uuid.uuid4().hex
            tries[asyncio.create_task(self._ask(job, at, rid))] = at, rid

        start(server)
        failure: Retryable | None = None
        try:
            await asyncio.wait(tries, timeout=after_s)
            others = [s for s in self._pool() if s is not server]
            if others and not any(task.done() for task in tries):
                self._count("rollout/hedged")
                start(min(others, key=_load))
            pending = set(tries)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        return task.result()
                    except Retryable as e:
                        failure = e
            assert failure is not None
            raise failure
        finally:
            for task, (at, rid) in tries.items():
                if not task.done():
                    task.cancel()
                    self._abort(at, rid)
                elif not task.cancelled():
                    task.exception()  # of a loser that answered in the same moment: it is known

    def _abort(self, server: Server, rid: str) -> None:
        client = self._clients[server.index]

        async def abort() -> None:
            try:
                await client.abort(rid)
            except RolloutError as e:
                log.warning("a request that another server answered first goes on: %s", e)

        task = asyncio.create_task(abort())
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)

    def _pool(self) -> list[Server]:
        """Who may be asked now. A few that failed a moment ago are left out."""
        ready = [s for s in self._servers if s.ready]
        if not ready:
            troubles = "; ".join(s.trouble or f"{s.url} has weights of version {s.version}" for s in self._servers)
            raise Retryable(f"no rollout server is ready now: {troubles}")
        now = time.monotonic()
        if self._cfg.router is not None:
            return self._asked
        well = [s for s in ready if not s.suspect or now - s.failed_at > AVOID_S]
        return well if 2 * len(well) >= len(ready) else ready

    def _home(self, job: Job) -> Server:
        """The server with the fewest tokens outstanding, or the one that has the prompt in its cache, as long as that
        is no more than its group's share ahead.
        """
        pool = self._pool()
        if self._cfg.repeatable:
            return min(pool, key=lambda s: (s.index - self._leader) % len(self._servers))
        least, home = min(pool, key=_load), job.kin.home
        if home in pool and home.outstanding_tokens - least.outstanding_tokens < job.kin.tokens:
            return home
        job.kin.home = least
        return least

    def _check_versions(self, completions: Sequence[Completion], oldest: int | None, server: Server) -> None:
        if oldest is None:
            return
        # A publish while the request runs makes it newer, and the next one may be under way; anything beyond that is of
        # before a roll-back.
        now = self._newest()
        newest = oldest if self._cfg.max_staleness == 0 or now is None else now + 1
        try:
            check_versions(completions, oldest, newest)
        except WrongVersion as e:
            raise WrongVersion(f"{server.url}: {e}") from e

    def _enter_loop(self) -> None:
        """Connections belong to one event loop: make new ones where this is another than last time."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            # Each of thousands of requests in flight is a hundred objects, and their growth alone set off collections
            # of the oldest generation, a third of the client's time.
            young, middle, old = gc.get_threshold()
            gc.set_threshold(young, middle, max(old, OLDEST_AFTER))
            self._clients = [
                ServerClient(s.url, self._keys, request_timeout_s=self._cfg.request_timeout_s) for s in self._asked
            ]
            self._slots = asyncio.Semaphore(self._cfg.max_in_flight)
            self._loop = loop

    def _count_retry(self, error: Retryable, where: str) -> None:
        """`where`: the server's URL; empty where there was none to ask."""
        kinds: dict[type, str] = {WrongVersion: "wrong_version", BadAnswer: "bad_answer"}
        self._count("rollout/retries")
        self._count(f"rollout/{kinds.get(type(error), 'unreachable')}")
        said_at, since = self._said.get(where, (float("-inf"), 0))
        now = time.monotonic()
        if now - said_at < SAY_EVERY_S:
            self._said[where] = said_at, since + 1
            return
        more = f" (and {since} more since {now - said_at:.0f} s)" if since else ""
        log.warning("a request is repeated: %s%s", error, more)
        self._said[where] = now, 0

    def _count(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0.0) + 1.0


def _allow_connections(number: int) -> None:
    """Have this process's limit of open files admit so many; RolloutError where that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise RolloutError(
            f"rollout.max_in_flight={number} needs a connection for each request, and this process may not open more "
            f"than {hard} files: lower it to at most {max(1, hard - OTHER_FILES)}, or raise `ulimit -Hn`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _load(server: Server) -> tuple[int, int]:
    return server.outstanding_tokens, server.index
