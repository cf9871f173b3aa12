"""The reward of a run: one or several weighted graders, and what happens when one of them fails.

Called by the rollout source and by evaluate, from one event loop. Knows nothing of servers, models or ranks.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import regex

from megasapo.config import ConfigError
from megasapo.metrics import Metric, Sum
from megasapo.rewards.inline import exact_match, format_match, http
from megasapo.rewards.options import bind_options
from megasapo.rewards.pool import GraderError, GraderPool, RewardError
from megasapo.sections import RewardConfig, RewardSpec
from megasapo.types import Prompt, Reward

INLINE: dict[str, Callable[..., Coroutine[Any, Any, float]]] = {
    "exact_match": exact_match,
    "format": format_match,
    "http": http,
}
IN_WORKER = {"math": "megasapo.rewards.math:math"}
HTTP_CONNECTIONS = 64
EPISODE = ""  # among the sources of failures; no grader has this name
FAILURES_SHOWN = 3  # of each step; the rest are only counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scored:
    """One response's reward: `reward` is the weighted sum of `parts`, by reward name; a failed part is 0."""

    reward: float
    parts: Mapping[str, float]
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Grader:
    name: str
    weight: float
    score: Reward


class RewardModel:
    """Scores responses; use as `async with RewardModel(cfg) as model`, from one event loop.

    A grader that raises, takes longer than cfg.timeout_s, or returns what is not a finite number has failed: under
    `on_error: error` RewardError is raised; under `zero` that part scores 0 and is counted. cfg.max_errors_in_a_row
    failures of one grader, one after another, raise RewardError in either case: nothing could be learnt from it.
    `max_workers` bounds the processes of each grader that needs them.
    """

    def __init__(self, cfg: RewardConfig, *, max_workers: int | None = None) -> None:
        self._cfg = cfg
        self._max_workers = max_workers or max(2, min(8, (os.cpu_count() or 2) // 4))
        check(cfg)
        self._graders: list[_Grader] = []
        self._opened = AsyncExitStack()
        self._num_errors = self._num_episode_errors = 0
        self._errors_in_a_row: dict[str, int] = {}  # of each grader, and of the episode

    @property
    def names(self) -> list[str]:
        """Of the parts of a score."""
        return _unique([spec.name for spec in self._cfg.rewards])

    async def start(self) -> None:
        """Load every grader. Raises RewardError naming one that cannot be loaded."""
        try:
            for name, spec in zip(self.names, self._cfg.rewards):
                self._graders.append(_Grader(name, spec.weight, await self._load(spec)))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End every worker process, a hanging one included."""
        self._graders = []
        await self._opened.aclose()

    async def __aenter__(self) -> RewardModel:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def score(self, prompt: Prompt, response: str) -> Scored:
        """Raises RewardError when the run has to stop. The episode of this response, if any, went well."""
        if not self._graders:
            raise RuntimeError("RewardModel.score before start() or after close()")
        self._errors_in_a_row.pop(EPISODE, None)
        results = await asyncio.gather(*(self._part(g, prompt, response) for g in self._graders))
        parts = {g.name: part for g, (part, _) in zip(self._graders, results)}
        reward = math.fsum(g.weight * part for g, (part, _) in zip(self._graders, results))
        return Scored(reward, parts, tuple(error for _, error in results if error))

    def failed_episode(self, episode: str, prompt: Prompt, response: str, e: Exception) -> Scored:
        """The score of a sample whose episode failed, by the same policy and ceiling as for graders."""
        self._num_episode_errors += 1
        problem = self._failed(EPISODE, f"rollout.episode {episode}", prompt, response, e, self._num_episode_errors)
        return Scored(0.0, dict.fromkeys(self.names, 0.0), (problem,))

    async def score_group(self, prompt: Prompt, responses: Sequence[str]) -> list[Scored]:
        """All responses to one prompt, scored at once, in order."""
        return list(await asyncio.gather(*(self.score(prompt, response) for response in responses)))

    def take_metrics(self) -> dict[str, Metric]:
        """Counts since the last call."""
        metrics: dict[str, Metric] = {"reward/grader_errors": Sum(float(self._num_errors))}
        if self._num_episode_errors:
            metrics["rollout/episode_errors"] = Sum(float(self._num_episode_errors))
        self._num_errors = self._num_episode_errors = 0
        return metrics

    async def _part(self, grader: _Grader, prompt: Prompt, response: str) -> tuple[float, str | None]:
        try:
            value = await grader.score(prompt, response)
            if not math.isfinite(value):
                raise GraderError(f"returned {value}")
        except RewardError:
            raise
        except Exception as e:  # a grader is the outside world: anything it raises is scored by policy
            self._num_errors += 1
            return 0.0, self._failed(grader.name, f"reward {grader.name}", prompt, response, e, self._num_errors)
        self._errors_in_a_row.pop(grader.name, None)
        return value, None

    def _failed(self, source: str, what: str, prompt: Prompt, response: str, e: Exception, number: int) -> str:
        cause = str(e) if isinstance(e, GraderError) else f"{type(e).__name__}: {e}"
        problem = f"{what} failed on prompt {prompt.index} and response {response[:80]!r}: {cause}"
        in_a_row = self._errors_in_a_row[source] = self._errors_in_a_row.get(source, 0) + 1
        if self._cfg.on_error == "error":
            raise RewardError(f"{problem}; reward.on_error=zero would score such responses 0") from e
        if in_a_row >= self._cfg.max_errors_in_a_row:
            raise RewardError(f"{problem}; it was failure {in_a_row} in a row, no use going on") from e
        if number <= FAILURES_SHOWN:
            logger.warning("%s; scored 0", problem)
        return problem

    async def _load(self, spec: RewardSpec) -> Reward:
        if spec.name not in INLINE:
            pool = GraderPool(
                IN_WORKER.get(spec.name, spec.name),
                spec.options,
                timeout_s=self._cfg.timeout_s,
                max_workers=self._max_workers,
            )
            self._opened.push_async_callback(pool.close)
            await pool.start()
            return pool
        given = []
        if spec.name == "http":
            import httpx

            # No limits of its own: every call has reward.timeout_s as a whole.
            client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=HTTP_CONNECTIONS))
            given.append(await self._opened.enter_async_context(client))
        grade = INLINE[spec.name]
        return _timed(lambda prompt, response: grade(prompt, response, *given, **spec.options), self._cfg.timeout_s)


def _timed(score: Reward, timeout_s: float) -> Reward:
    slots = asyncio.Semaphore(HTTP_CONNECTIONS)  # waiting for a connection does not count towards the timeout

    async def timed(prompt: Prompt, response: str) -> float:
        async with slots:
            try:
                async with asyncio.timeout(timeout_s):
                    return await score(prompt, response)
            except TimeoutError as e:
                raise GraderError(str(e) or f"took longer than reward.timeout_s={timeout_s}") from e

    return timed


def check(cfg: RewardConfig) -> None:
    """Raise ConfigError for an unknown reward or module, an option it does not have, or a pattern that is none."""
    for spec in cfg.rewards:
        _check(spec)


def _check(spec: RewardSpec) -> None:
    if ":" in spec.name:
        _check_module(spec.name.partition(":")[0])
    if ":" in spec.name or spec.name in IN_WORKER:
        return  # the worker that loads it checks its options
    if spec.name not in INLINE:
        known = [*INLINE, *IN_WORKER]
        close = difflib.get_close_matches(spec.name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(known)} or package.module:function"
        raise ConfigError(f"reward.rewards: unknown reward {spec.name!r}; {hint}")
    try:
        bind_options(spec.name, INLINE[spec.name], spec.options)
        if spec.options.get("pattern") is not None:
            regex.compile(spec.options["pattern"])
    except (ValueError, TypeError, regex.error) as e:
        raise ConfigError(f"reward.rewards: {spec.name}: {e}") from e


def _check_module(module: str) -> None:
    """That python finds it; it is imported by the worker alone."""
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        found = False
    finally:
        sys.path.pop(0)
    if not found:
        raise ConfigError(
            f"reward.rewards: there is no module {module!r}: it is looked for where python finds modules, and in the "
            f"working directory {os.getcwd()}"
        )


def _unique(names: list[str]) -> list[str]:
    """A name that occurs again gets its number: format, format#2."""
    return [n if names[:i].count(n) == 0 else f"{n}#{names[:i].count(n) + 1}" for i, n in enumerate(names)]
