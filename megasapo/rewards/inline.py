"""Rewards that run in the process that trains: exact match, format, and a grader behind HTTP.

Each is one async function over a prompt and a response (types.Reward); model.py binds their options. They finish or
fail in bounded time by themselves: regular expressions and requests have a time limit.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import regex

from megasapo.types import Prompt

REGEX_TIMEOUT_S = 1.0  # a pattern that backtracks without end must not hold up the event loop
FIRST_RETRY_AFTER_S = 0.2


async def exact_match(prompt: Prompt, response: str, *, pattern: str | None = None, ignore_case: bool = False) -> float:
    """1 if the response equals the answer, whitespace around both left out, else 0.

    With `pattern`, the last match in the response is compared instead: its group 1, or all of it without groups. No
    match scores 0.
    """
    given = response
    if pattern is not None:
        match = None
        for match in regex.finditer(pattern, response, timeout=REGEX_TIMEOUT_S):  # noqa: B007 - the last one is meant
            pass
        if match is None:
            return 0.0
        given = match.group(1 if match.re.groups else 0) or ""
    given, answer = given.strip(), prompt.answer.strip()
    if ignore_case:
        given, answer = given.casefold(), answer.casefold()
    return float(given == answer)


async def format_match(prompt: Prompt, response: str, *, pattern: str, full: bool = True) -> float:
    """1 if the response has the form of `pattern` (all of it; with full=False, some part of it), else 0.

    `.` matches line ends too: responses have many lines.
    """
    find = regex.fullmatch if full else regex.search
    return float(find(pattern, response, flags=regex.DOTALL, timeout=REGEX_TIMEOUT_S) is not None)


async def http(
    prompt: Prompt,
    response: str,
    client: Any,
    /,
    *,
    url: str,
    headers: dict[str, str] | None = None,
    retries: int = 3,
) -> float:
    """What a server answers to POST {"prompt", "response", "answer", "fields"}: {"reward": number}.

    5xx, 429 and broken connections are tried again up to `retries` times with growing pauses; any other answer raises
    ValueError. `client` is an httpx.AsyncClient; the reward's timeout is kept by the caller.
    """
    import httpx

    body = {"prompt": prompt.text, "response": response, "answer": prompt.answer, "fields": dict(prompt.fields)}
    content = json.dumps(body, default=str)  # parquet fields can be dates and the like
    headers = {"content-type": "application/json", **(headers or {})}
    for attempt in range(retries + 1):
        try:
            answer = await client.post(url, content=content, headers=headers)
        except httpx.TransportError as e:
            problem = f"{type(e).__name__}: {e}"
        else:
            if answer.status_code < 500 and answer.status_code != 429:
                return _read_answer(url, answer)
            problem = f"status {answer.status_code}"
        if attempt < retries:
            await asyncio.sleep(FIRST_RETRY_AFTER_S * 2**attempt)
    raise ValueError(f"{url}: {problem}, after {retries + 1} attempts")


def _read_answer(url: str, answer: Any) -> float:
    if answer.status_code != 200:
        raise ValueError(f"{url}: status {answer.status_code}: {answer.text[:200]}")
    try:
        reward = answer.json()["reward"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{url}: expected {{"reward": number}}, got {answer.text[:200]!r}') from e
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise ValueError(f"{url}: reward must be a number, got {reward!r}")
    return float(reward)
