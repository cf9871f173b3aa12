"""The HTTP side: routes, keys, error shapes, and what happens when a client goes away.

A Starlette application over one Engine; all torch work happens on the engine's thread. Answers follow SGLang 0.5.21's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from megasapo import __version__
from megasapo.keys import Keys
from megasapo.rollout.local import protocol
from megasapo.rollout.local.control import Control
from megasapo.rollout.local.engine import Engine, EngineError
from megasapo.rollout.local.model import Loaded
from megasapo.rollout.local.options import Options
from megasapo.rollout.local.sequence import Job, Sampling, Sequence
from megasapo.rollout.local.stream import Stream
from megasapo.rollout.local.weights import WeightError

log = logging.getLogger("megasapo.serve")


class App:
    """Handlers of one server."""

    def __init__(
        self, options: Options, loaded: Loaded, engine: Engine, control: Control, max_total_tokens: int
    ) -> None:
        self._options = options
        self._loaded = loaded
        self._engine = engine
        self._control = control
        self._max_total_tokens = max_total_tokens
        self._started = time.time()

    def asgi(self) -> ASGIApp:
        c = self._control
        post, both = ["POST"], ["GET", "POST"]
        control = [
            Route("/update_weights_from_disk", self._weights(c.update_from_disk), methods=post),
            Route("/begin_weight_update", self._weights(c.begin_update), methods=post),
            Route("/end_weight_update", self._weights(c.end_update), methods=post),
            Route("/init_weights_update_group", self._weights(c.init_group), methods=post),
            Route("/destroy_weights_update_group", self._weights(c.destroy_group), methods=post),
            Route("/update_weights_from_distributed", self._weights(c.update_from_distributed), methods=post),
            Route("/update_weights_from_tensor", self._weights(c.update_from_tensor), methods=post),
            Route("/update_weight_version", self._weights(c.update_version), methods=post),
            Route("/weights_checker", self._weights(c.checksum), methods=both),
            Route("/get_weights_by_name", self._plain(c.get_weight), methods=both),
            Route("/pause_generation", self._plain(c.pause), methods=post),
            Route("/continue_generation", self._plain(c.resume), methods=post),
            Route("/abort_request", self._abort, methods=post),
            Route("/flush_cache", self._flush, methods=both),
        ]
        others = [
            Route("/generate", self._generate, methods=["POST", "PUT"]),
            *(Route(path, self._health) for path in ("/health", "/health_generate")),
            *(Route(path, self._model_info) for path in ("/model_info", "/get_model_info")),
            *(Route(path, self._server_info) for path in ("/server_info", "/get_server_info")),
            Route("/v1/loads", self._loads),
        ]
        handlers: dict[Any, Any] = {
            HTTPException: lambda _, e: _error(e.status_code, str(e.detail)),
            EngineError: lambda _, e: _error(500, str(e)),
            **dict.fromkeys((protocol.BadRequest, WeightError), lambda _, e: _error(400, str(e))),
        }
        app = Starlette(routes=[*control, *others], exception_handlers=handlers)
        return Guard(app, self._options, frozenset(route.path for route in control))

    def close(self) -> None:
        """When the last request has been answered."""
        self._control.close()

    # Generation

    async def _generate(self, request: Request) -> Response:
        body = await _json(request)
        routing = self._options.enable_return_routed_experts
        wanted = protocol.parse(body, self._loaded, self._max_total_tokens, routing)
        if wanted.stream:
            return Stream(self._engine, self._loaded, wanted)
        job, done = self._submit(wanted.sequences)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                log.info("client disconnected: %s", wanted.sequences[0].rid)
                return Response(status_code=499)
            done.result()
            for s in wanted.sequences:
                if s.finish is not None and s.finish.get("status_code"):
                    return _error(s.finish["status_code"], s.finish["message"])
            return JSONResponse(self._answers(wanted))
        finally:
            gone.cancel()
            self._engine.abandon(job)

    def _answers(self, wanted: protocol.Generate) -> Any:
        version = self._engine.weight_version
        answers = [protocol.answer(s, self._loaded, version, wanted.text_in_logprobs) for s in wanted.sequences]
        return answers if wanted.many else answers[0]

    def _submit(self, sequences: list[Sequence]) -> tuple[Job, asyncio.Future[None]]:
        """A job of these, and what is done when it is, or has the engine's error."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def notify(error: Exception | None) -> None:
            settle = partial(done.set_result, None) if error is None else partial(done.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed: the server has ended and nobody waits
                loop.call_soon_threadsafe(settle)

        job = Job(sequences, notify)
        self._engine.submit(job)
        return job, done

    # State

    async def _health(self, request: Request) -> Response:
        """200 when the engine answers; an idle one must also generate a token, unless it is paused then."""
        limit_s = self._options.health_timeout_s
        try:
            idle = self._engine.control(lambda: not self._engine.paused and self._engine.num_unfinished() == 0)
            async with asyncio.timeout(limit_s):
                if await asyncio.wrap_future(idle):
                    await self._generate_one()
        except (EngineError, TimeoutError) as e:
            silent = f"the engine does not answer in --health-timeout-s={limit_s:g}"
            return PlainTextResponse(str(e) or silent, status_code=503)
        return Response(status_code=200)

    async def _generate_one(self) -> None:
        sampling = Sampling(1, 0.0, 1.0, protocol.TOP_K_ALL, 0.0, 0, frozenset(), (), 0)
        job, done = self._submit([Sequence(f"HEALTH_CHECK_{uuid.uuid4().hex}", [0], sampling)])
        try:
            while not (done.done() or self._engine.paused):
                await asyncio.wait({done}, timeout=0.1)
            if done.done():
                done.result()
        finally:
            self._engine.abandon(job)

    async def _model_info(self, request: Request) -> Response:
        config = self._loaded.model.config
        return JSONResponse(
            {
                "model_path": self._control.model_path,
                "served_model_name": self._options.model,
                "tokenizer_path": self._options.model,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self._engine.weight_version,
                "load_format": "auto",
                "model_type": config.model_type,
                "architectures": config.architectures,
            }
        )

    async def _server_info(self, request: Request) -> Response:
        o = self._options
        return JSONResponse(
            {
                "version": __version__,
                "engine": "megasapo",
                "model_path": self._control.model_path,
                "tokenizer_path": o.model,
                "served_model_name": o.model,
                "host": o.host,
                "port": o.port,
                "device": o.device,
                "dtype": str(self._loaded.model.dtype).removeprefix("torch."),
                "quantization": "fp8" if self._loaded.weights is not None else None,
                "context_length": self._loaded.context_length,
                "max_total_num_tokens": self._max_total_tokens,
                "max_running_requests": o.max_running_requests,
                "max_req_input_len": min(self._loaded.context_length, self._max_total_tokens) - 1,
                "weight_version": self._engine.weight_version,
                "enable_return_routed_experts": o.enable_return_routed_experts,
                "deterministic": o.deterministic,
                "tp_size": 1,
                "dp_size": 1,
                "startup_time": self._started,
                "internal_states": [await self._load()],
            }
        )

    async def _load(self) -> dict[str, Any]:
        def count() -> tuple[int, int, bool]:
            return self._engine.num_running(), self._engine.num_unfinished(), self._engine.paused

        running, unfinished, paused = await asyncio.wrap_future(self._engine.control(count))
        return {
            "dp_rank": 0,
            "num_running_reqs": running,
            "num_waiting_reqs": unfinished - running,
            "max_total_num_tokens": self._max_total_tokens,
            "max_running_requests": self._options.max_running_requests,
            "paused": paused,
        }

    async def _loads(self, request: Request) -> Response:
        return JSONResponse({"version": __version__, "loads": [await self._load()]})

    # Control

    def _weights(self, fn: Callable[[dict[str, Any]], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        """Weight calls say what went wrong as {"success": false, "message": ...}."""

        async def handler(request: Request) -> Response:
            try:
                return JSONResponse(await fn(await _body(request)))
            except (ValueError, RuntimeError) as e:  # BadRequest, WeightError, torch.distributed's own
                log.warning("%s: %s", request.url.path, e)
                status = 500 if isinstance(e, EngineError) else 400
                content = {"success": False, "message": str(e), "num_paused_requests": 0}
                return JSONResponse(content, status_code=status)

        return handler

    def _plain(self, fn: Callable[[dict[str, Any]], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def handler(request: Request) -> Response:
            return JSONResponse(await fn(await _body(request)))

        return handler

    async def _abort(self, request: Request) -> Response:
        await self._control.abort(await _body(request))
        return Response(status_code=200)

    async def _flush(self, request: Request) -> Response:
        try:
            timeout_s = max(0.0, float(request.query_params.get("timeout", 0)))
        except ValueError as e:
            raise protocol.BadRequest(f"timeout: {e}") from e
        try:
            return PlainTextResponse(await self._control.flush(timeout_s))
        except protocol.BadRequest as e:
            return PlainTextResponse(str(e), status_code=400)


class Guard:
    """Keys, body size and what no handler caught, in front of the application.

    `control_paths` are those that the admin key protects where there is one.
    """

    def __init__(self, app: ASGIApp, options: Options, control_paths: frozenset[str]) -> None:
        self._app, self.control_paths, self._max_body_bytes = app, control_paths, options.max_body_bytes
        self._keys = Keys(options.api_key, options.admin_api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        if not self._allowed(scope["path"], authorization):
            await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

    def _allowed(self, path: str, authorization: bytes) -> bool:
        """As SGLang: health is open, control paths take only the admin key where there is one, the rest the API key."""
        if path.startswith("/health"):
            return True
        key = self._keys.control if path in self.control_paths else self._keys.api
        if key is None:
            return True
        scheme, _, given = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(given, key.encode())

    def _counting(self, receive: Receive) -> Receive:
        """A body is cut off at the limit, whatever length it says it has."""
        seen = 0

        async def limited() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body_bytes:
                raise HTTPException(413, f"the body has more than {self._max_body_bytes} bytes")
            return message

        return limited


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)


async def _json(request: Request, empty: bytes = b"") -> Any:
    """The body's JSON; `empty` where there is none."""
    try:
        text = (await request.body() or empty).decode()
        content = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair can be escaped, but no tokenizer and no answer can take it
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise protocol.BadRequest(f"the body is not JSON: {e}") from e
    except ClientDisconnect as e:
        raise protocol.BadRequest("the client went away before its body had come") from e
    return content


async def _body(request: Request) -> dict[str, Any]:
    """A control call's JSON object; no body is an empty one."""
    body = await _json(request, empty=b"{}")
    if not isinstance(body, dict):
        raise protocol.BadRequest(f"expected a JSON object, found {type(body).__name__}")
    return body


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
