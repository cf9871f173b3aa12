"""The server process: loads the model, starts the engine, listens, says it is ready, ends cleanly.

Called by `main` of this package, after the options are known to be good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import torch
import uvicorn
from safetensors import SafetensorError

from megasapo import launch
from megasapo.errors import UserError
from megasapo.geometry import read_config
from megasapo.rollout.local.app import App
from megasapo.rollout.local.batch import Batch
from megasapo.rollout.local.control import Control
from megasapo.rollout.local.engine import Engine
from megasapo.rollout.local.forward import Forward
from megasapo.rollout.local.model import Loaded, load
from megasapo.rollout.local.options import Options
from megasapo.rollout.local.weights import Weights

log = logging.getLogger("megasapo.serve")
STEP_S = 10.0  # at the end, for the step that the engine is in, and for its requests to be told
STUCK_S = 15.0  # from SIGTERM or the end of stdin to a forced exit


def serve(options: Options, listener: socket.socket) -> int:
    """Run until SIGTERM, SIGINT or (if asked) the end of stdin; the exit code says whether the engine lived."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = _load(options)
    engine, app = build(options, loaded)
    launch.freeze_heap()
    engine.start()
    try:
        asyncio.run(_listen_and_serve(options, engine, app, listener))
    finally:
        engine.stop()
    return 1 if engine.crashed else 0


def _load(options: Options) -> Loaded:
    """The model. Raises UserError where the directory is not what transformers can load."""
    read_config(options.model)
    try:
        return load(options)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(f"--model {options.model} does not load: {e}") from e


def build(options: Options, loaded: Loaded) -> tuple[Engine, App]:
    """The engine (not started) and the application of a loaded model."""
    rows, routing = options.max_running_requests, options.enable_return_routed_experts
    plain = options.plain_forward or loaded.weights is not None  # the fused arithmetic rounds no activations
    forward = Forward(loaded.model, options.max_total_tokens, rows, routing, plain)
    weights = loaded.weights or Weights(loaded.model)  # after the forward pass, which may move parameters
    batch = Batch(forward, options.max_prefill_tokens, loaded.text_decoder())
    engine = Engine(batch, options.weight_version, options.deterministic)
    control = Control(engine, weights, options.model, loaded.model.device)
    return engine, App(options, loaded, engine, control, forward.cache.max_cells)


async def _listen_and_serve(options: Options, engine: Engine, app: App, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app.asgi(),
        log_level="info" if options.log_requests else "warning",
        access_log=options.log_requests,
        timeout_graceful_shutdown=int(STEP_S),
        timeout_keep_alive=75,
        lifespan="off",
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()

    def leave() -> None:
        if not server.should_exit:
            server.should_exit = True
            _exit_when_stuck()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)

    if options.exit_with_parent:
        threading.Thread(target=_watch_stdin, args=(loop, leave), daemon=True).start()
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or task.done()):
        await asyncio.sleep(0.01)
    if server.started:
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"megasapo serve: ready at http://{host}:{options.port}", flush=True)
    while not (server.should_exit or task.done()):
        await asyncio.sleep(0.05)
    # Requests in flight fail now, with a message, instead of holding the server until their last token.
    await asyncio.to_thread(engine.stop, STEP_S)
    await task
    app.close()


class _Server(uvicorn.Server):
    """uvicorn ends the process by the very signal it has caught; here SIGTERM is a clean end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _watch_stdin(loop: asyncio.AbstractEventLoop, leave: Callable[[], None]) -> None:
    """The parent holds the other end of stdin; when it dies, however it dies, reading ends."""
    while os.read(0, 4096):
        pass
    _exit_when_stuck()  # here too: the event loop may not get to run
    loop.call_soon_threadsafe(leave)


def _exit_when_stuck() -> None:
    """A server that has not ended by then is in a long step, or a thread waits for a learner that does not come."""
    timer = threading.Timer(STUCK_S, os._exit, args=(1,))
    timer.daemon = True
    timer.start()
