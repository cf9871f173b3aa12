"""Where a training step's groups come from: draws prompts, has them sampled and scored, keeps staleness bounded.

Called by train.py on every rank; data-parallel leaders talk to the fleet, the others take part in the waiting. Knows
nothing of the learner: republishing weights to a restarted server is a function it is given.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megasapo.config import Config
from megasapo.data.prompts import PromptStream
from megasapo.rewards.model import RewardModel
from megasapo.rollout.protocol import RolloutError
from megasapo.types import Engine, Group, Prompt, Sample, SamplingParams

T = TypeVar("T")
POLL_S = 0.05
MAX_REFILLS = 20


class Ranks(Protocol):
    """What this module needs to know of the layout (mcore.topology.Topology has it)."""

    @property
    def dp(self) -> int: ...
    @property
    def dp_rank(self) -> int: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def world_group_cpu(self) -> Any: ...


class LoopThread:
    """One asyncio loop in a background thread: the home of every connection to a rollout server."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-loop", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.submit(work).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)


@dataclass(frozen=True, slots=True)
class _Pending:
    stream_state: dict[str, Any]  # before this batch's prompts were drawn
    future: Future[list[Group]]


class RolloutSource:
    """Groups of scored samples, `rollout.prompts_per_step` a step over all data-parallel leaders."""

    def __init__(
        self,
        cfg: Config,
        engine: Engine | None,
        stream: PromptStream,
        scorer: RewardModel,
        decode: Callable[[tuple[int, ...]], str],
        ranks: Ranks,
        loop: LoopThread,
        *,
        stale: Callable[[], bool],
        republish: Callable[[int], None],
    ):
        """`engine`: None on ranks that are no leader. `stale()`: some server lacks the current weights;
        `republish(version)`, collective, gives them to it.
        """
        self._cfg, self._engine, self._stream, self._scorer, self._decode = cfg, engine, stream, scorer, decode
        self._ranks, self._loop, self._stale, self._republish = ranks, loop, stale, republish
        self._pending: deque[_Pending] = deque()
        # one request for the whole batch is the unit that a deterministic server repeats bit for bit
        self._together = cfg.rollout.deterministic and cfg.rollout.max_staleness == 0

    def next(self, version: int) -> tuple[list[Group], int]:
        """Collective. This leader's groups (none on other ranks) for the step after `version`, and groups dropped here.

        Raises RolloutError when a request could not be served or a grader failed under policy `error`.
        """
        ahead = min(self._cfg.rollout.max_staleness, self._cfg.train.steps - version - 1)
        while len(self._pending) < 1 + ahead:
            self._submit(self._cfg.rollout.prompts_per_step)
        groups = self.wait(self._pending.popleft().future, version)
        if not self._cfg.rollout.drop_zero_variance:
            return groups, 0
        return self._refill(groups, version)

    def state(self) -> dict[str, Any]:
        """Where to resume: before the oldest batch that is still in flight."""
        return self._pending[0].stream_state if self._pending else self._stream.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._stream.restore(state)

    def _submit(self, prompts: int) -> None:
        before = self._stream.state()
        drawn = [self._stream.next() for _ in range(prompts)]
        mine = [d for d in drawn if d[0] % self._ranks.dp == self._ranks.dp_rank] if self._ranks.is_leader else []
        self._pending.append(_Pending(before, self._loop.submit(self._sample(mine))))

    def _refill(self, groups: list[Group], version: int) -> tuple[list[Group], int]:
        """Replace groups that teach nothing until the batch is full again (DAPO, arXiv 2503.14476)."""
        wanted = self._cfg.rollout.prompts_per_step
        kept = [g for g in groups if np.ptp(g.rewards()) > 0]
        dropped = len(groups) - len(kept)
        for _ in range(MAX_REFILLS):
            missing = wanted - self._sum_over_ranks(len(kept))
            if missing <= 0:
                return kept, dropped
            self._submit(missing)
            fresh = self.wait(self._pending.pop().future, version)
            useful = [g for g in fresh if np.ptp(g.rewards()) > 0]
            kept, dropped = kept + useful, dropped + len(fresh) - len(useful)
        raise RolloutError(
            f"after {MAX_REFILLS} refills {missing} of {wanted} groups have all-equal rewards: the task is too easy "
            "or too hard for the policy; change the data or set rollout.drop_zero_variance=false"
        )

    async def _sample(self, drawn: list[tuple[int, Prompt]]) -> list[Group]:
        parts = [drawn] if self._together else [[d] for d in drawn]
        done = await asyncio.gather(*(self._sample_together(part) for part in parts if part))
        return [group for groups in done for group in groups]

    async def _sample_together(self, drawn: list[tuple[int, Prompt]]) -> list[Group]:
        size = self._cfg.rollout.group_size
        inputs = [prompt.input_ids for _, prompt in drawn for _ in range(size)]
        sampling = [self._sampling(uid, i) for uid, _ in drawn for i in range(size)]
        assert self._engine is not None
        completions = await self._engine.generate(inputs, sampling)
        texts = [self._decode(c.output_ids) for c in completions]

        async def finish(at: int, uid: int, prompt: Prompt) -> Group:
            rows = slice(at * size, (at + 1) * size)
            scores = await self._scorer.score_group(prompt, texts[rows])
            samples = tuple(
                Sample(completion, text, score.reward, score.parts, len(score.errors))
                for completion, text, score in zip(completions[rows], texts[rows], scores, strict=True)
            )
            return Group(uid, prompt, samples)

        return list(await asyncio.gather(*(finish(i, uid, prompt) for i, (uid, prompt) in enumerate(drawn))))

    def _sampling(self, uid: int, index: int) -> SamplingParams:
        r = self._cfg.rollout
        seed = int(np.random.SeedSequence([self._cfg.run.seed, uid, index]).generate_state(1)[0] >> 1)
        return SamplingParams(
            max_new_tokens=r.max_new_tokens,
            temperature=r.temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            stop_token_ids=r.stop_token_ids,
            sampling_seed=seed if self._together else None,
        )

    def wait(self, future: Future[T], version: int) -> T:
        """Collective: wait for every rank's future, giving restarted servers their weights meanwhile."""
        while True:
            wait([future], timeout=POLL_S)
            failed = future.done() and future.exception() is not None
            flags = torch.tensor([not future.done(), failed, self._stale()], dtype=torch.int32)
            dist.all_reduce(flags, group=self._ranks.world_group_cpu)
            unfinished, failures, stale = flags.tolist()
            if failures:
                if failed:
                    future.result()
                raise RolloutError("rollouts failed on another rank; its message is in that rank's output")
            if not unfinished:
                return future.result()
            if stale:
                self._republish(version)

    def _sum_over_ranks(self, number: int) -> int:
        total = torch.tensor([number])
        dist.all_reduce(total, group=self._ranks.world_group_cpu)
        return int(total)
