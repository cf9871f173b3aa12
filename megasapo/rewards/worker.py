"""The process that one grader runs in: reads (prompt, response) frames from stdin, writes one JSON line for each.

Started by pool.py as `python -m megasapo.rewards.worker`. It leaves when stdin ends, so it cannot outlive the run; a
grader that hangs is killed from outside.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import inspect
import json
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

from megasapo.rewards.options import OptionError, bind_options

FRAME = struct.Struct("!I")  # length of the pickle that follows


def main() -> None:
    answers = _private_stdout()
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the learner decides when to stop
    frames = sys.stdin.buffer
    settings = _read_frame(frames)
    if settings is None:
        return
    try:
        grade = load(settings["target"], settings["options"])
    except BaseException as e:  # reported to the parent, which stops the run with it
        known = isinstance(e, OptionError)
        _write(answers, {"error": str(e) if known else f"reward {settings['target']}: cannot be loaded: {_short(e)}"})
        return
    is_async = inspect.iscoroutinefunction(inspect.unwrap(grade.func))  # type: ignore[attr-defined]
    _write(answers, {"ready": True, "is_async": is_async})
    if is_async:
        asyncio.run(_serve_async(grade, frames, answers, settings["timeout_s"]))
    else:
        _serve(grade, frames, answers)


def load(target: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The function behind `package.module:function`, its options bound. Raises OptionError or what importing raises."""
    module_name, _, function_name = target.partition(":")
    function = importlib.import_module(module_name)
    for name in function_name.split("."):
        function = getattr(function, name)
    if not callable(function):
        raise OptionError(f"reward {target}: is not a function but {type(function).__name__}")
    return bind_options(target, function, options)


def _serve(grade: Callable[..., Any], frames: BinaryIO, answers: BinaryIO) -> None:
    while (request := _read_frame(frames)) is not None:
        try:
            answer = _answer(request["id"], grade(request["prompt"], request["response"]))
        except BaseException as e:  # whatever a grader raises, SystemExit included, is its answer
            answer = {"id": request["id"], "error": _short(e)}
        _write(answers, answer)


async def _serve_async(grade: Callable[..., Any], frames: BinaryIO, answers: BinaryIO, timeout_s: float) -> None:
    running: set[asyncio.Task[None]] = set()

    async def serve_one(request: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                answer = _answer(request["id"], await grade(request["prompt"], request["response"]))
        except BaseException as e:
            answer = {"id": request["id"], "error": _short(e)}
        _write(answers, answer)

    while (request := await asyncio.to_thread(_read_frame, frames)) is not None:
        task = asyncio.create_task(serve_one(request))
        running.add(task)
        task.add_done_callback(running.discard)


def _answer(request_id: int, reward: Any) -> dict[str, Any]:
    if isinstance(reward, str | bytes) or reward is None:
        raise TypeError(f"a reward must be a number, got {reward!r}")
    return {"id": request_id, "reward": float(reward)}


def _private_stdout() -> BinaryIO:
    """The stream the parent reads; what a grader prints goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _die_with_parent() -> None:
    """A grader that hangs never sees the end of stdin: ask Linux to kill it when the learner is gone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def _read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(FRAME.size)
    if len(head) < FRAME.size:
        return None
    (length,) = FRAME.unpack(head)
    body = stream.read(length)
    return pickle.loads(body) if len(body) == length else None


def _write(stream: BinaryIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()


def _short(e: BaseException) -> str:
    """The error and where it was raised, in one line."""
    frames = traceback.extract_tb(e.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(e).__name__}: {e}{where}"[:2000]


if __name__ == "__main__":
    main()
