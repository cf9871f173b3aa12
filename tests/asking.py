"""Asking a whole fleet from a test's main thread."""

from __future__ import annotations

import asyncio

from megasapo.rollout.fleet import Fleet
from megasapo.types import Completion, SamplingParams


def ask(fleet: Fleet, prompts: list[tuple[int, ...]], sampling: SamplingParams) -> list[Completion]:
    """One completion for each prompt, in order."""

    async def run() -> list[Completion]:
        try:
            return await fleet.generate(prompts, [sampling] * len(prompts))
        finally:
            await fleet.close()

    return asyncio.run(run())
