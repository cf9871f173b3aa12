"""A stand-in rollout server for tests of the client: answers `/generate` by a script of faults, over a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


class Standin:
    """`script`: what to do with the 1st, 2nd ... request to `/generate`; its last entry goes on for ever.

    Entries: "ok", a status code, "cut" (the connection ends in mid-body), "truncated" (half a JSON text), "nan",
    "null", "abort", "short" (a logprob too few), "slow" (answers after 30 s), or a dict merged into the first answer's
    meta_info.
    """

    def __init__(self, script: list[Any], version: str = "7") -> None:
        self.script, self.version = list(script), version
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []  # of requests to /generate
        self.asked: list[tuple[str, dict[str, str]]] = []  # path and headers of all others
        self.times: list[float] = []
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        if scope["path"] != "/generate":
            self.asked.append((scope["path"], headers))
            return await _reply(send, 200, json.dumps({"weight_version": self.version}).encode())
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.times.append(time.monotonic())
        self.bodies.append(json.loads(raw))
        self.headers.append(headers)
        action = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        await self._act(action, self.bodies[-1], send)

    async def _act(self, action: Any, body: dict[str, Any], send: Any) -> None:
        if isinstance(action, int):
            return await _reply(send, action, json.dumps({"error": {"message": f"scripted {action}"}}).encode())
        sampling = body["sampling_params"]
        each = sampling if isinstance(sampling, list) else [sampling] * len(body["input_ids"])
        answers = [self._answer(ids, s) for ids, s in zip(body["input_ids"], each, strict=True)]
        meta = answers[0]["meta_info"]
        if isinstance(action, dict):
            meta.update(action)
        elif action == "nan":
            meta["output_token_logprobs"][1][0] = float("nan")
        elif action == "null":
            meta["output_token_logprobs"][1][0] = None
        elif action == "short":
            meta["output_token_logprobs"].pop()
        elif action == "abort":
            meta["finish_reason"] = {"type": "abort", "message": "scripted abort", "status_code": 500}
        elif action == "slow":
            await asyncio.sleep(30)
        text = json.dumps(answers).encode()
        if action == "truncated":
            text = text[: len(text) // 2]
        if action == "cut":
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]}
            )
            await send({"type": "http.response.body", "body": text[:10], "more_body": True})
            raise ConnectionAbortedError("scripted")
        await _reply(send, 200, text)

    def _answer(self, ids: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        out = [(sum(ids) + i) % 100 for i in range(sampling["max_new_tokens"])]
        return {
            "text": "",
            "output_ids": out,
            "meta_info": {
                "finish_reason": {"type": "length", "length": len(out)},
                "prompt_tokens": len(ids),
                "completion_tokens": len(out),
                "weight_version": self.version,
                "output_token_logprobs": [[-0.5 - 0.25 * i, t, None] for i, t in enumerate(out)],
            },
        }


async def _reply(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(standin: Standin) -> Iterator[Standin]:
    """Run it on a free loopback port, its `url`, until the end of the block."""
    server = uvicorn.Server(uvicorn.Config(standin, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    standin.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield standin
    finally:
        server.should_exit = True
        thread.join(10)
