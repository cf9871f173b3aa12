"""The watch over a fleet's servers: starts them, restarts what died, knows who is up and which weights each holds.

One thread with one event loop, owned by a fleet; weight and pause calls run in the same loop. A server that missed a
publish to disk is brought up to date here; after other ways only a new publish can do that. The fleets of the other
data-parallel leaders have a watch that only looks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megasapo.keys import Keys
from megasapo.log.heartbeat import write_json
from megasapo.rollout.client import ServerClient
from megasapo.rollout.loop import LoopThread
from megasapo.rollout.protocol import Refused, Retryable, RolloutError, parse_version
from megasapo.rollout.servers import Server
from megasapo.rollout.spawn import ServerProcess, free_port, server_command
from megasapo.sections import RolloutConfig

log = logging.getLogger(__name__)
T = TypeVar("T")
POLL_S = 0.2
LOOK_EVERY_S = 2.0
HEALTH_EVERY_S = 30.0
REPORT_EVERY_S = 2.0
PORT_ATTEMPTS = 3
OWN_LIMITS = "SGLANG_HEALTH_CHECK_TIMEOUT (SGLang; 20) or --health-timeout-s (megasapo serve; 20)"
LEFT_PAUSED = "; it answers /model_info: if a run that was killed left it paused, POST /continue_generation to it"


class Watch:
    """See the module. `start` and `stop` from the main thread; `failure` is why the run must end, if it must."""

    def __init__(
        self,
        cfg: RolloutConfig,
        servers: list[Server],
        model: Path,
        run_dir: Path | None,
        keys: Keys,
        on_lost: Callable[[Server], None],
    ) -> None:
        """`run_dir`: of logs; None where another process owns the servers. `on_lost`: called in the watch's thread when
        a server that was asked will not answer any more."""
        self.failure: Exception | None = None
        self._cfg, self._servers, self._model, self._run_dir, self._keys = cfg, servers, model, run_dir, keys
        self._on_lost = on_lost
        self._version: int | None = None
        self._weights_dir: Path | None = None
        self._restarts_counted = 0
        self._epoch = 0  # of versions: an answer asked for in an earlier one says nothing now
        self._clients: dict[str, ServerClient] = {}  # by URL
        self._tasks: list[asyncio.Task[None]] = []
        self._loop = LoopThread("rollout-watch")
        self._updating = asyncio.Lock()  # held while weights of any server change
        self._stopped = False

    # --- from the main thread ---

    def start(self) -> None:
        """Bring all servers up, then keep watching. Raises RolloutError when one does not come up in time."""
        self._loop.run(self._start_all())

    def start_looking(self) -> None:
        """Watch servers that another process has started and are there."""
        for server in self._servers:
            server.up = server.ready = True
        self._loop.run(self._keep_all())

    def stop(self) -> None:
        """End the watch and every server it spawned."""
        if self._stopped:
            return
        self._stopped = True
        self.submit(self._close()).result(30)
        self._loop.close()
        processes = [server.process for server in self._servers if server.process is not None]
        with ThreadPoolExecutor(len(processes) or 1) as pool:  # one that hangs is given its time to end
            list(pool.map(ServerProcess.stop, processes))
        for server in self._servers:
            server.up = server.ready = False

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return self._loop.submit(work)

    def client(self, server: Server) -> ServerClient:
        """For calls in this watch's loop."""
        client = self._clients.get(server.url)
        if client is None:
            client = self._clients[server.url] = ServerClient(
                server.url,
                self._keys,
                request_timeout_s=self._cfg.request_timeout_s,
                question_timeout_s=self._cfg.health_timeout_s,
            )
        return client

    def needs_publish(self, server: Server) -> bool:
        behind = self._version is not None and server.version is not None and server.version != self._version
        return server.up and behind and self._weights_dir is None and not self._updating.locked()

    def take_restarts(self) -> float:
        """Restarts since the last call."""
        total = sum(s.restarts for s in self._servers)
        new, self._restarts_counted = total - self._restarts_counted, total
        return float(new)

    # --- in the loop ---

    async def _start_all(self) -> None:
        for server in self._servers:
            server.starting = True
        self._tasks = [asyncio.create_task(self._report())]
        results = await asyncio.gather(*(self._first_start(s) for s in self._servers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        await self._keep_all()

    async def _keep_all(self) -> None:
        self._tasks += [asyncio.create_task(self._keep(s)) for s in self._servers]

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    async def answering(self) -> list[Server]:
        """The servers that are up and answer at this moment, which `up` may learn a little later."""
        up = [s for s in self._servers if s.up]
        infos = await asyncio.gather(*(self.client(s).model_info() for s in up), return_exceptions=True)
        for info in infos:
            if isinstance(info, BaseException) and not isinstance(info, Retryable):
                raise info
        return [s for s, info in zip(up, infos, strict=True) if not isinstance(info, BaseException)]

    async def _report(self) -> None:
        """Forever: the servers as they are, into RUN/logs/servers.json, for `megasapo watch`."""
        assert self._run_dir is not None
        path = self._run_dir / "logs" / "servers.json"
        while True:
            record = {
                "written": time.time(),
                "version": self._version,
                "max_restarts": self._cfg.max_restarts,
                "servers": [s.record() for s in self._servers],
            }
            try:
                await asyncio.to_thread(write_json, path, record)
            except OSError as e:  # a file system that is slow to answer must not end the run
                log.warning("cannot write %s: %s", path, e)
            await asyncio.sleep(REPORT_EVERY_S)

    async def hold(self) -> None:
        """Leave all versions alone until `release`; waits for an update that is under way."""
        await self._updating.acquire()
        self._epoch += 1

    async def release(self, version: int | None, updated: Sequence[Server] | None, weights_dir: Path | None) -> None:
        """`updated` have `version` now and the rest do not; None: nothing is known, ask them."""
        self._epoch += 1
        self._version = version
        if updated is not None:
            self._weights_dir = weights_dir
        for server in self._servers:
            done = updated is not None and any(s is server for s in updated)
            server.version = version if done else None
            server.look_at = server.look_at if done else 0.0
            self._judge(server)
        self._updating.release()

    def _judge(self, server: Server) -> None:
        current = self._version is None or server.version == self._version
        ready = server.up and current and not server.hung
        if ready and server.trouble:
            server.trouble = ""
            self._say("rollout server %d is ready again", server.index)
        server.ready = ready  # last: other threads take the rest to be right then

    def _say(self, message: str, *args: object) -> None:
        """Once for the run, whatever number of leaders looks."""
        if self._run_dir is not None:
            log.warning(message, *args)

    def _lose(self, server: Server, why: str, *, hung: bool = False) -> None:
        """It does not answer, or (hung) its model does not: whoever waits for it must look elsewhere."""
        was_up = server.up and not server.hung
        server.up, server.ready, server.hung, server.trouble = hung, False, hung, why
        if was_up:
            self._on_lost(server)

    async def _first_start(self, server: Server) -> None:
        """A port may be taken between choosing it and the server's bind; anything else ends the run at once."""
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            try:
                await self._start(server)
                return
            except RolloutError as e:
                taken = not self._cfg.servers and "address already in use" in str(e).lower()
                if not (taken and attempts_left):
                    raise
                server.url = f"http://127.0.0.1:{free_port()}"

    async def _start(self, server: Server) -> None:
        """Spawn it, unless it is not ours, and wait until it is healthy."""
        server.starting = True
        if not self._cfg.servers:
            assert self._run_dir is not None
            port = int(server.url.rsplit(":", 1)[1])
            server.process = ServerProcess(
                server_command(self._cfg, self._model, port),
                self._run_dir / "logs" / f"server_{server.index}.log",
                exits_with_stdin=self._cfg.engine == "embedded",
            )
        deadline = time.monotonic() + self._cfg.start_timeout_s
        while trouble := await self._trouble(server):
            if server.process is None:
                if not any(s.trouble for s in self._servers):  # of many that are started now, one will do
                    patience = f"for up to rollout.start_timeout_s={self._cfg.start_timeout_s:g}"
                    self._say("rollout server %d is not there yet; waits %s: %s", server.index, patience, trouble)
                server.trouble = trouble
            end = server.end()
            if end is not None or time.monotonic() > deadline:
                end = end or f"not healthy in rollout.start_timeout_s={self._cfg.start_timeout_s:g}: {trouble}"
                if server.process is not None:
                    await asyncio.to_thread(server.process.stop)
                elif await self._answers(server):
                    end += LEFT_PAUSED
                server.starting = False
                raise RolloutError(f"rollout server {server.index} at {server.url}: {end}{server.log_end()}")
            await asyncio.sleep(POLL_S)
        server.incarnation += 1
        server.started_at = server.seen_at = time.monotonic()
        server.starting = server.hung = False
        if server.process is None:  # it was never away
            server.trouble = ""
        await self._look(server)

    async def _trouble(self, server: Server) -> str:
        """Why it is not healthy, if it is not."""
        try:
            await self.client(server).check_health()
        except Retryable as e:
            return str(e)
        return ""

    async def _answers(self, server: Server) -> bool:
        try:
            await self.client(server).model_info()
        except RolloutError:
            return False
        return True

    async def _keep(self, server: Server) -> None:
        """Forever: restart it when it died, look at its version now and then."""
        try:
            while True:
                await asyncio.sleep(POLL_S)
                end = server.end()
                if end is not None:
                    await self._restart(server, end)
                elif time.monotonic() > server.look_at:
                    server.look_at = time.monotonic() + LOOK_EVERY_S
                    await self._look_again(server)
                    await self._bring_up_to_date(server)
        except asyncio.CancelledError:
            raise
        except Exception as e:
            log.exception("the watch over rollout server %d ends", server.index)
            self._lose(server, str(e))
            server.given_up = True
            if all(s.given_up for s in self._servers) or not isinstance(e, RolloutError):
                self.failure = e

    async def _restart(self, server: Server, why: str) -> None:
        cfg = self._cfg
        if server.seen_at - server.started_at >= cfg.restarts_forgiven_after_s:
            server.in_a_row = 0
        while True:
            self._lose(server, why)
            server.version = server.refused_version = None
            server.restarts += 1
            server.in_a_row += 1
            if server.in_a_row > cfg.max_restarts:
                raise RolloutError(
                    f"rollout server {server.index} at {server.url} {why}; it has been restarted rollout.max_restarts="
                    f"{cfg.max_restarts} times without rollout.restarts_forgiven_after_s="
                    f"{cfg.restarts_forgiven_after_s:g} of health in between{server.log_end()}"
                )
            log.warning("rollout server %d %s: restart %d", server.index, why, server.restarts)
            if server.process is not None:
                await asyncio.to_thread(server.process.stop)  # what is left of its process group
            try:
                await self._start(server)
                return await self._bring_up_to_date(server)
            except RolloutError as e:
                why = str(e)

    async def _look_again(self, server: Server) -> None:
        """A server of others may have been started anew with another key, or be another program: until it is mended."""
        try:
            await self._look(server)
        except Refused as e:
            if server.up:
                self._say("rollout server %d refuses this run, its requests go elsewhere: %s", server.index, e)
            self._lose(server, str(e))

    async def _look(self, server: Server) -> None:
        """Ask for its version, and now and then for a token. A process silent for rollout.start_timeout_s is ended (and
        so restarted)."""
        epoch = self._epoch
        try:
            info = await self.client(server).model_info()
        except Retryable as e:
            if server.up and not server.hung:
                self._say("rollout server %d does not answer, its requests go elsewhere: %s", server.index, e)
            self._lose(server, str(e))
            await self.client(server).close()  # an update of its weights, say, would wait for it as well
            return await self._end_silent(server)
        if not server.up and server.process is None:
            server.incarnation += 1  # not ours: it may have been restarted while it was away
        server.up = True
        # Only the owner knows when servers are paused, and no request fails of that.
        due = server.suspect or server.hung or (self._run_dir is not None and time.monotonic() > server.health_at)
        if due and (server.ready or server.hung) and not self._updating.locked():  # one that is paused gives no token
            try:
                await self.client(server).check_health()
            except Retryable as e:
                if epoch == self._epoch:
                    if not server.hung:
                        message = "rollout server %d generates nothing, its requests go elsewhere: %s; %s"
                        self._say(message, server.index, e, self._patience(server))
                    self._lose(server, str(e), hung=True)
                return await self._end_silent(server)
            server.suspect = server.hung = False
            server.health_at = time.monotonic() + HEALTH_EVERY_S
        server.seen_at = time.monotonic()
        if epoch == self._epoch and not self._updating.locked():
            server.version = parse_version(info.get("weight_version"))
            self._judge(server)

    def _patience(self, server: Server) -> str:
        """What to raise for a server that is well and only slow."""
        own = "" if server.process is not None else f" and, where it is started, {OWN_LIMITS}"
        setting = f"rollout.health_timeout_s={self._cfg.health_timeout_s:g}"
        return f"if one of its steps may take so long, raise {setting}{own}"

    async def _end_silent(self, server: Server) -> None:
        silent_s = time.monotonic() - server.seen_at
        if server.process is not None and silent_s > self._cfg.start_timeout_s:
            limit_s = self._cfg.start_timeout_s
            message = "rollout server %d has been silent for %.0f s, above rollout.start_timeout_s=%g: it is ended"
            log.warning(message, server.index, silent_s, limit_s)
            await asyncio.to_thread(server.process.stop)

    async def _looking(self, server: Server, work: Coroutine[Any, Any, None]) -> None:
        """Look at a server while it works: one that hangs in it is found out, and the work ends with a Retryable."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_EVERY_S))[0]:
                await self._look(server)
            task.result()
        finally:
            task.cancel()

    async def _bring_up_to_date(self, server: Server) -> None:
        behind = server.up and server.version not in (None, self._version) and server.refused_version != self._version
        if not behind or self._weights_dir is None:
            return
        async with self._updating:
            if self._version is None or self._weights_dir is None or server.version == self._version:
                return
            version, weights_dir, client = self._version, self._weights_dir, self.client(server)
            log.warning("rollout server %d lacks version %d: it loads %s", server.index, version, weights_dir)
            try:
                await self._looking(server, client.load_from_disk(weights_dir, version, "retract"))
            except Refused as e:
                server.refused_version, server.trouble = version, str(e)
                log.error("rollout server %d cannot load version %d and is left out: %s", server.index, version, e)
                if all(s.refused_version == version for s in self._servers):
                    raise RolloutError(f"no server can load version {version}: {e}") from e
            except Retryable as e:
                server.trouble = str(e)  # it may have died; the next look decides
                log.warning("rollout server %d did not load version %d: %s", server.index, version, e)
            else:
                server.version = version
                self._judge(server)
