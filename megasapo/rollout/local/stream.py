"""A streamed answer to /generate: SGLang's server-sent events, fed by the engine's thread.

Made by the HTTP application for one checked request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from megasapo.rollout.local import protocol
from megasapo.rollout.local.engine import Engine
from megasapo.rollout.local.model import Loaded
from megasapo.rollout.local.sequence import Job


class Stream(StreamingResponse):
    """Submits its job when made, so that a stopped engine's EngineError comes before the answer has begun."""

    def __init__(self, engine: Engine, loaded: Loaded, wanted: protocol.Generate) -> None:
        self._engine = engine
        self._loaded = loaded
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._errors: list[Exception] = []
        self._job = Job(wanted.sequences, self._notify, stream=True)
        engine.submit(self._job)
        super().__init__(self._events(), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # a client may leave before the first event
            self._engine.abandon(self._job)

    def _notify(self, error: Exception | None) -> None:
        """On the engine's thread."""
        if error is not None:
            self._errors.append(error)
        with suppress(RuntimeError):  # the loop is closed: the server has ended and nobody waits
            self._loop.call_soon_threadsafe(self._news.set)

    async def _events(self) -> AsyncIterator[bytes]:
        """One event for every sequence that has new tokens, cumulative, then [DONE]; fewer events for a slow reader."""
        wanted = self._wanted
        sent = [(0, False)] * len(wanted.sequences)
        while not all(finished for _, finished in sent) and not self._errors:
            await self._news.wait()
            self._news.clear()
            for i, s in enumerate(wanted.sequences):
                out = protocol.answer(s, self._loaded, self._engine.weight_version, wanted.text_in_logprobs)
                state = (len(out["output_ids"]), out["meta_info"]["finish_reason"] is not None)
                if state != sent[i]:
                    sent[i] = state
                    yield _event(out | {"index": i} if wanted.many else out)
            await asyncio.sleep(0)  # tokens may come faster than they are written: others get their turn
        if self._errors:
            yield _event({"error": {"message": str(self._errors[0]), "type": "internal_error", "code": 500}})
        yield b"data: [DONE]\n\n"


def _event(content: Any) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
