"""Episodes: samples that take several calls of the engine, with what tools or an environment say in between.

`rollout.episode` names an async function `module:function(engine, sample)`; it runs in the learner's process, in the
event loop of the rollouts. Without one, a sample is one request. Used by the sampler and by evaluate.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megasapo.config import ConfigError
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.transcript import Transcript
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, Engine, FinishReason, Prompt, SamplingParams

Decode = Callable[[tuple[int, ...]], str]
Encode = Callable[[str], Sequence[int]]


def seed_of(*numbers: int) -> int:
    """A sampling seed below 2**31 for these numbers, not negative: the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


class EpisodeError(RuntimeError):
    """An episode asked for what cannot be; counted like anything else that an episode raises."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the engine sampled in one call; the token that stopped it is the last of `ids`."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason


class Conversation:
    """The `sample` of an episode: its prompt, all turns and what was added between them, and what room is left."""

    def __init__(
        self, prompt: Prompt, sampling: SamplingParams, *, max_turns: int, decode: Decode, encode: Encode
    ) -> None:
        self.prompt = prompt
        self.turns = 0
        self.decode, self.encode = decode, encode
        self._max_turns, self._sampling = max_turns, sampling
        self._transcript = Transcript(prompt.input_ids)
        self._busy = self._cut = False
        self._clock: asyncio.Timeout | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens, those of the prompt first."""
        return tuple(self._transcript.ids)

    @property
    def text(self) -> str:
        """Everything after the prompt: what rewards see."""
        return self.decode(self._transcript.output_ids)

    @property
    def tokens_left(self) -> int:
        """Of rollout.max_new_tokens, which what is added counts towards as well."""
        return self._sampling.max_new_tokens - len(self._transcript.output_ids)

    @property
    def done(self) -> bool:
        """Whether no more turn is possible: out of rollout.max_turns or of tokens."""
        return self.turns >= self._max_turns or self.tokens_left <= 0

    def add(self, text: str | Sequence[int]) -> None:
        """Text (or tokens) that the engine did not sample: read, not learned from. What has no room is cut off."""
        if self._busy:
            raise EpisodeError("sample.add while a turn of the same sample is being generated")
        ids = self.encode(text) if isinstance(text, str) else text
        self._cut = self._cut or len(ids) > self.tokens_left
        self._transcript.given(list(ids)[: self.tokens_left])


class Turns:
    """The `engine` of an episode."""

    def __init__(self, ask: Callable[[tuple[int, ...], SamplingParams], Awaitable[Completion]], patience_s: float):
        self._ask, self._patience_s = ask, patience_s

    async def generate(
        self, sample: Conversation, *, max_new_tokens: int | None = None, stop_token_ids: Sequence[int] = ()
    ) -> Turn:
        """Sample what comes next, up to a stop token or the limit, and put it at the end of `sample`.

        At rollout's temperature, for that is how the learner computes logprobs. EpisodeError when `sample.done`.
        """
        if sample.done or sample._busy:
            why = "another turn of it is being generated" if sample._busy else "it is done (ask sample.done before)"
            raise EpisodeError(f"engine.generate on a sample: {why}")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise EpisodeError(f"engine.generate: max_new_tokens={max_new_tokens}: give at least 1, or nothing")
        base = sample._sampling
        room = sample.tokens_left
        seed = base.sampling_seed
        if seed is not None and sample.turns:
            seed = seed_of(seed, sample.turns)
        sampling = replace(
            base,
            max_new_tokens=room if max_new_tokens is None else min(room, max_new_tokens),
            stop_token_ids=(*base.stop_token_ids, *stop_token_ids),
            sampling_seed=seed,
        )
        clock = sample._clock
        assert clock is not None
        sample._busy = True
        clock.reschedule(None)  # servers have timeouts of their own
        try:
            done = await self._ask(sample.ids, sampling)
        finally:
            sample._busy = False
            clock.reschedule(asyncio.get_running_loop().time() + self._patience_s)
        sample._transcript.sampled(done)
        sample.turns += 1
        sample._cut = done.finish_reason == "length"
        return Turn(sample.decode(done.output_ids), done.output_ids, done.finish_reason)


class Lockstep:
    """The next turns of all running episodes as one request: the unit that a deterministic server repeats."""

    def __init__(self, generate: Callable[[list[Any], list[Any]], Awaitable[list[Completion]]], running: int) -> None:
        self._generate, self._running = generate, running
        self._waiting: dict[int, tuple[tuple[int, ...], SamplingParams, asyncio.Future[Completion]]] = {}
        self._request: asyncio.Task[None] | None = None

    async def ask(self, place: int, ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
        """The completion for the episode at `place`, once every other one asks or has ended."""
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting[place] = (ids, sampling, answer)
        self._go_if_complete()
        return await answer

    def ended(self) -> None:
        self._running -= 1
        self._go_if_complete()

    def close(self) -> None:
        if self._request is not None:
            self._request.cancel()

    def _go_if_complete(self) -> None:
        if self._waiting and len(self._waiting) == self._running:
            asked, self._waiting = [self._waiting[place] for place in sorted(self._waiting)], {}
            self._request = asyncio.create_task(self._send(asked))

    async def _send(self, asked: list[tuple[tuple[int, ...], SamplingParams, asyncio.Future[Completion]]]) -> None:
        try:
            completions = await self._generate([ids for ids, _, _ in asked], [s for _, s, _ in asked])
        except Exception as e:
            for _, _, answer in asked:
                if not answer.done():
                    answer.set_exception(e)
            return
        for (_, _, answer), completion in zip(asked, completions, strict=True):
            if not answer.done():
                answer.set_result(completion)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One sample before it is scored; `error` is what ended its episode early."""

    completion: Completion
    error: Exception | None = None


class Completer:
    """Completions of prompts from an engine: one request each, or an episode each (rollout.episode)."""

    def __init__(
        self, engine: Engine, cfg: RolloutConfig, decode: Decode, encode: Encode, *, version: Callable[[], int]
    ) -> None:
        """`version`: of the weights now, for a sample that fails before its first turn."""
        self._engine, self._cfg, self._decode, self._encode, self._version = engine, cfg, decode, encode, version
        self._episode = load(cfg.episode) if cfg.episode else None

    async def __call__(
        self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], *, routed: bool = False
    ) -> list[Outcome]:
        """One outcome for each prompt, in order. Raises RolloutError as the engine does."""

        async def generate(ids: list[tuple[int, ...]], params: list[SamplingParams]) -> list[Completion]:
            return await self._engine.generate(ids, params, return_routed_experts=routed)

        if self._episode is None:
            return [Outcome(done) for done in await generate([p.input_ids for p in prompts], list(sampling))]
        lockstep = Lockstep(generate, len(prompts)) if self._cfg.repeatable else None

        async def run(place: int, prompt: Prompt, params: SamplingParams) -> Outcome:
            async def ask(ids: tuple[int, ...], asked: SamplingParams) -> Completion:
                if lockstep is not None:
                    return await lockstep.ask(place, ids, asked)
                return (await generate([ids], [asked]))[0]

            try:
                return await self._run(prompt, params, Turns(ask, self._cfg.tool_timeout_s))
            finally:
                if lockstep is not None:
                    lockstep.ended()

        try:
            async with asyncio.TaskGroup() as group:  # one that stops the run stops the others
                tasks = [
                    group.create_task(run(i, p, s)) for i, (p, s) in enumerate(zip(prompts, sampling, strict=True))
                ]
        except BaseExceptionGroup as e:
            raise e.exceptions[0] from None
        finally:
            if lockstep is not None:
                lockstep.close()
        return [task.result() for task in tasks]

    async def _run(self, prompt: Prompt, sampling: SamplingParams, engine: Turns) -> Outcome:
        assert self._episode is not None
        cfg = self._cfg
        sample = Conversation(prompt, sampling, max_turns=cfg.max_turns, decode=self._decode, encode=self._encode)
        error: Exception | None = None
        try:
            async with asyncio.timeout(cfg.tool_timeout_s) as sample._clock:
                await self._episode(engine, sample)
            if not sample.turns:
                raise EpisodeError("it ended without a turn: engine.generate was never called")
        except RolloutError:
            raise
        except TimeoutError as e:
            expired = sample._clock is not None and sample._clock.expired()
            error = EpisodeError(f"took longer than rollout.tool_timeout_s={cfg.tool_timeout_s:g}") if expired else e
        except Exception as e:  # its tools are the outside world: counted, scored 0, with a ceiling
            error = e
        whole = sample._transcript
        if not whole.output_ids:
            whole.given(prompt.input_ids[-1:])  # a sequence to learn from has a prediction, if only one without weight
        return Outcome(whole.completion("length" if sample._cut else "stop", self._version()), error)


def load(target: str) -> Callable[[Turns, Conversation], Awaitable[None]]:
    """The async function `module:function`, looked for where graders are, too: in the working directory."""
    module_name, _, name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"rollout.episode={target}: cannot be loaded: {type(e).__name__}: {e}") from e
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"rollout.episode={target}: not an async function: write async def {name}(engine, sample)")
    return function
