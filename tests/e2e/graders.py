"""Rewards for end-to-end tests, named in their configurations as tests.e2e.graders:NAME."""

from __future__ import annotations

from megasapo.types import Prompt


def digits_unless_poisoned(prompt: Prompt, response: str) -> float:
    """1 for a response with a digit; prompts whose answer is "poison" are punished absurdly."""
    return -1000.0 if prompt.answer == "poison" else float(any(c.isdigit() for c in response))


def digits_unless_held_out(prompt: Prompt, response: str) -> float:
    """1 for a response with a digit; a problem whose answer is "held out" cannot be graded."""
    if prompt.answer == "held out":
        raise RuntimeError("no grader for what is held out")
    return float(any(c.isdigit() for c in response))
