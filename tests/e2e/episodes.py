"""An episode for the runs of test_variants.py."""

from __future__ import annotations

from megasapo.rollout.episode import Conversation, Turns


async def two_turns(engine: Turns, sample: Conversation) -> None:
    await engine.generate(sample, max_new_tokens=6)
    sample.add([7, 8, 9])
    await engine.generate(sample, max_new_tokens=6)
