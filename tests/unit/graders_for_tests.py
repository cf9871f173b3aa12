"""Graders that behave badly, as a user's might; loaded by name in worker processes, so this imports no test tool."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from megasapo.types import Prompt


def length(prompt: Prompt, response: str, *, scale: float = 1.0) -> float:
    print("graders may print")
    return len(response) * scale


def pid(prompt: Prompt, response: str) -> int:
    return os.getpid()


def num_keys(prompt: Prompt, response: str) -> int:
    return sum(name in os.environ for name in ("MEGASAPO_API_KEY", "MEGASAPO_ADMIN_API_KEY"))


def field(prompt: Prompt, response: str) -> float:
    return prompt.fields["points"]


def misbehave(prompt: Prompt, response: str) -> object:
    if response == "raise":
        raise RuntimeError("no mood")
    if response == "exit":
        sys.exit(3)
    if response == "die":
        os._exit(9)
    if response == "sleep":
        time.sleep(600)
    if response == "spin":
        while True:
            pass
    return {"nan": float("nan"), "inf": float("inf"), "text": "1", "none": None}.get(response, 1)


async def judge(prompt: Prompt, response: str) -> float:
    if response == "block":
        time.sleep(600)  # stops its event loop
    if response == "late":
        time.sleep(4)  # as a process that gets no turn
    if response != "now":
        await asyncio.sleep(600 if response == "wait" else 0.2)
    return 0.5


def of_another_library(*, completions: list[str], answer: str) -> float:
    return 1.0


def with_an_answer(prompt: Prompt, response: str, answer: str) -> float:
    return 1.0


def wrapped(*args: object, **options: object) -> float:
    return float(len(str(args[1])))


not_a_function = 3
