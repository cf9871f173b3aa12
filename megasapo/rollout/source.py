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
from megasapo.metrics import Metrics
from megasapo.rewards.model import RewardModel
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import RolloutError
from megasapo.routing.trace import is_traced
from megasapo.types import Group, Prompt, Sample, SamplingParams

T = TypeVar("T")
POLL_S = 0.05
MAX_DRAWN = 20  # batches' worth of prompts for one step before drop_zero_variance gives up


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
        fleet: Fleet | None,
        stream: PromptStream,
        scorer: RewardModel,
        decode: Callable[[tuple[int, ...]], str],
        ranks: Ranks,
        loop: LoopThread,
        *,
        republish: Callable[[int], None],
    ):
        """`fleet`: None on ranks that are no leader. `republish(version)`, collective, gives weights to a server that
        lacks them.
        """
        self._cfg, self._fleet, self._stream, self._scorer, self._decode = cfg, fleet, stream, scorer, decode
        self._ranks, self._loop, self._republish = ranks, loop, republish
        self._pending: deque[_Pending] = deque()
        self.failed = False  # rollouts or graders have, which every rank knows
        # one request for the whole batch is the unit that a deterministic server repeats bit for bit
        self._together = cfg.rollout.repeatable

    def next(self, version: int) -> tuple[list[Group], int]:
        """Collective. This leader's groups (none on other ranks) for the step after `version`, and groups dropped here.

        Raises RolloutError when a request could not be served or a grader failed under policy `error`.
        """
        ahead = min(self._cfg.rollout.max_staleness, self._cfg.train.steps - version - 1)
        while len(self._pending) < 1 + ahead:
            self._submit(self._cfg.rollout.prompts_per_step, step=version + 1 + len(self._pending))
        groups = self.wait(self._pending[0].future, version)
        self._pending.popleft()  # not before: what could not be served is drawn again
        if not self._cfg.rollout.drop_zero_variance:
            return groups, 0
        return self._refill(groups, version)

    def state(self) -> dict[str, Any]:
        """Where to resume: before the oldest batch that is still in flight.

        With drop_zero_variance and max_staleness > 0, prompts drawn as replacements meanwhile are drawn again.
        """
        return self._pending[0].stream_state if self._pending else self._stream.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._stream.restore(state)

    def discard_pending(self) -> None:
        """Give up what is in flight, for the weights that sample it are no more; its prompts are drawn again."""
        state = self.state()
        for pending in self._pending:
            pending.future.cancel()
        self._pending.clear()
        self._stream.restore(state)

    def take_metrics(self) -> Metrics:
        """Graders' errors, retries by cause and restarts of servers since the last call."""
        return self._scorer.take_metrics() | (self._fleet.take_metrics() if self._fleet is not None else {})

    def _submit(self, prompts: int, step: int) -> None:
        """Have new prompts sampled for a step; steps count from 1."""
        before = self._stream.state()
        drawn = [self._stream.next() for _ in range(prompts)]
        mine = [d for d in drawn if d[0] % self._ranks.dp == self._ranks.dp_rank] if self._ranks.is_leader else []
        self._pending.append(_Pending(before, self._loop.submit(self._sample(mine, step))))

    def _refill(self, groups: list[Group], version: int) -> tuple[list[Group], int]:
        """Draw new prompts in place of groups that teach nothing until the batch is full (DAPO, arXiv 2503.14476).

        The useful groups with the lowest uids are kept, so that the batch does not depend on the layout.
        """
        wanted = self._cfg.rollout.prompts_per_step
        drawn = wanted
        while True:
            useful = [g for g in groups if np.ptp(g.rewards()) > 0]
            uids = sorted(self._gather([g.uid for g in useful]))
            if len(uids) >= wanted:
                kept = [g for g in useful if g.uid <= uids[wanted - 1]]
                return kept, len(groups) - len(kept)
            if drawn >= MAX_DRAWN * wanted:
                raise RolloutError(
                    f"of {drawn} groups {len(uids)} have unequal rewards, {wanted} are wanted: the task is too easy "
                    "or too hard for the policy; change the data or set rollout.drop_zero_variance=false"
                )
            expected = -(-(wanted - len(uids)) * drawn // max(len(uids), 1))  # at the rate seen so far
            more = min(expected, 2 * wanted, MAX_DRAWN * wanted - drawn)
            self._submit(more, step=version + 1)
            groups = groups + self.wait(self._pending.pop().future, version)
            drawn += more

    async def _sample(self, drawn: list[tuple[int, Prompt]], step: int) -> list[Group]:
        parts = [drawn] if self._together else [[d] for d in drawn]
        done = await asyncio.gather(*(self._sample_together(part, step) for part in parts if part))
        return [group for groups in done for group in groups]

    async def _sample_together(self, drawn: list[tuple[int, Prompt]], step: int) -> list[Group]:
        size = self._cfg.rollout.group_size
        inputs = [prompt.input_ids for _, prompt in drawn for _ in range(size)]
        sampling = [self._sampling(uid, i) for uid, _ in drawn for i in range(size)]
        assert self._fleet is not None
        routed = self._wants_routing(step, [uid * size + i for uid, _ in drawn for i in range(size)])
        completions = await self._fleet.generate(inputs, sampling, return_routed_experts=routed)
        texts = [self._decode(c.output_ids) for c in completions]

        async def finish(at: int, uid: int, prompt: Prompt) -> Group:
            rows = slice(at * size, (at + 1) * size)
            scores = await self._scorer.score_group(prompt, texts[rows])
            samples = tuple(
                Sample(completion, text, score.reward, score.parts)
                for completion, text, score in zip(completions[rows], texts[rows], scores, strict=True)
            )
            return Group(uid, prompt, samples)

        return list(await asyncio.gather(*(finish(i, uid, prompt) for i, (uid, prompt) in enumerate(drawn))))

    def _wants_routing(self, step: int, uids: list[int]) -> bool:
        """Whether the samples `uids` of a step are replayed, explained, or one of them traced."""
        r = self._cfg.routing
        if self._cfg.algo.routing_replay == "R3" or (r.diagnose_every > 0 and step % r.diagnose_every == 0):
            return True
        return any(is_traced(uid, r.trace_rate, self._cfg.run.seed) for uid in uids)

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
            lacking = self._fleet is not None and self._fleet.stale()
            flags = torch.tensor([not future.done(), failed, lacking], dtype=torch.int32)
            dist.all_reduce(flags, group=self._ranks.world_group_cpu)
            unfinished, failures, stale = flags.tolist()
            if failures:
                self.failed = True
                if failed:
                    future.result()
                raise RolloutError("rollouts failed on another rank; its message is in that rank's output")
            if not unfinished:
                return future.result()
            if stale:
                self._republish(version)

    def _gather(self, mine: list[int]) -> list[int]:
        """All ranks' numbers."""
        everyones: list[list[int]] = [[] for _ in range(dist.get_world_size(self._ranks.world_group_cpu))]
        dist.all_gather_object(everyones, mine, group=self._ranks.world_group_cpu)
        return [number for part in everyones for number in part]
