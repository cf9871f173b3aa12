"""The episode of the calculator example: the model may write `[34*57]` and reads `1938>` before it goes on."""

from __future__ import annotations

import re

from megasapo.rollout.episode import Conversation, Turns

CALL = re.compile(r"\[(\d{1,9})\*(\d{1,9})\]$")


async def calculator(engine: Turns, sample: Conversation) -> None:
    """Turns until the model ends its answer without a question to the calculator, or has no room left."""
    bracket = sample.encode("]")
    while not sample.done:
        turn = await engine.generate(sample, stop_token_ids=bracket)
        if not turn.text.endswith("]"):
            return
        sample.add(answer(turn.text))


def answer(text: str) -> str:
    """What the calculator says to the last question in a text."""
    call = CALL.search(text)
    return f"{int(call[1]) * int(call[2])}>" if call else "?>"
