"""The embedded server inside a test's own process: engine thread and application, asked over an in-memory transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from safetensors.torch import load_file

from megasapo.rollout.local.engine import Engine
from megasapo.rollout.local.model import Loaded, load
from megasapo.rollout.local.options import Options
from megasapo.rollout.local.server import build
from tests.tiny import weights_checksum

TIMEOUT_S = 300.0  # of what hangs


class Serving:
    """One server. `ask` runs a coroutine function over a client; `generate` and `post` are the short ways."""

    def __init__(self, options: Options) -> None:
        self.loaded: Loaded = load(options)
        self.engine: Engine
        self.engine, app = build(options, self.loaded)
        self.asgi = app.asgi()
        self.routes = self.asgi._app.routes  # behind the guard
        self.held_at = 0

    def client(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.asgi, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://server", timeout=TIMEOUT_S, headers=headers)

    def ask(self, fn: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
        async def run() -> Any:
            async with self.client() as client, asyncio.timeout(TIMEOUT_S):
                return await fn(client)

        return asyncio.run(run())

    def post(self, path: str, body: Any = None, method: str = "POST", **headers: str) -> httpx.Response:
        async def send(client: httpx.AsyncClient) -> httpx.Response:
            return await client.request(method, path, json={} if body is None else body, headers=headers)

        return self.ask(send)

    def generate(self, **body: Any) -> Any:
        answer = self.post("/generate", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def checksum(self) -> str:
        """Of the weights that it holds, as it says."""
        answer: str = self.post("/weights_checker", {"action": "checksum"}).json()["checksum"]
        return answer

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds between two steps of the engine."""
        deadline = time.monotonic() + TIMEOUT_S
        while not await asyncio.wrap_future(self.engine.control(condition)):
            assert time.monotonic() < deadline, "the condition never held"
            await asyncio.sleep(0.001)

    @contextmanager
    def holding(self, num_tokens: int = 3) -> Iterator[None]:
        """The engine stands still, as long as this lasts, once all that was asked has at least that many tokens.

        What a test does to running requests then never comes too late, however busy the machine is.
        """
        engine = self.engine
        steppable = engine._steppable
        engine._steppable = lambda: steppable() and not self._all_have(num_tokens)  # type: ignore[method-assign]
        self.held_at = num_tokens
        try:
            yield
        finally:
            with engine._wake:
                del engine._steppable
                engine._wake.notify()

    async def started(self, running: int = 1) -> None:
        """Wait, in `holding`, until so many sequences run and stand still."""
        await self.until(lambda: self.engine.num_running() == running and self._all_have(self.held_at))

    def _all_have(self, num_tokens: int) -> bool:
        rows = self.engine.batch.rows
        return bool(rows) and not self.engine._waiting and all(len(s.output) >= num_tokens for s in rows)


@contextmanager
def serving(model_dir: Path, **options: Any) -> Iterator[Serving]:
    """A server with these Options, stopped at the end."""
    server = Serving(Options(model=str(model_dir), **options))
    server.engine.start()
    try:
        yield server
    finally:
        server.engine.stop()


def file_checksum(directory: Path) -> str:
    """What a server that holds this model says."""
    return weights_checksum(load_file(directory / "model.safetensors"))
