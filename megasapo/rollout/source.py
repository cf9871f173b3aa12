"""Where a training step's groups come from: draws prompts, has them sampled and scored, keeps staleness bounded.

Called by train.py on every rank; data-parallel leaders talk to the fleet, the others take part in the waiting. Knows
nothing of the learner: republishing weights to a restarted server is a function it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megasapo.config import Config
from megasapo.data.prompts import PromptStream
from megasapo.metrics import Metrics, Sum
from megasapo.rewards.model import RewardModel
from megasapo.rollout import waiting
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.loop import LoopThread
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.sampler import Sampler
from megasapo.routing.trace import is_traced
from megasapo.types import Group, Prompt, Ranks

T = TypeVar("T")
POLL_S = 0.05
MAX_DRAWN = 20  # batches' worth of prompts for one step before drop_zero_variance gives up


@dataclass(slots=True)
class _Flight:
    """One prompt under way, from when it is drawn until its group is used. Every rank lists all of them."""

    uid: int
    prompt: Prompt
    stream_state: dict[str, Any]  # before it was drawn
    started: int = 0  # the version at which this leader asked for it last
    future: Future[list[Group]] | None = None  # this leader's; one request's groups share it
    at: int = 0  # its place among them
    kept: Group | None = None  # what a checkpoint held of it

    def group(self) -> Group | None:
        """Once it is finished; what its sampling raised is for `_poll` to raise, on every rank."""
        f = self.future
        if f is not None and f.done() and not f.cancelled() and f.exception() is None:
            return f.result()[self.at]
        return self.kept

    def give_up(self) -> None:
        if self.future is not None:
            self.future.cancel()
        self.future = self.kept = None


class RolloutSource:
    """Groups of scored samples, `rollout.prompts_per_step` a step over all data-parallel leaders."""

    def __init__(
        self,
        cfg: Config,
        fleet: Fleet | None,
        stream: PromptStream,
        scorer: RewardModel,
        sampler: Sampler | None,
        ranks: Ranks,
        loop: LoopThread,
        *,
        republish: Callable[[int], None],
    ):
        """`fleet`, `sampler`: None on ranks that are no leader. `republish(version)`, collective, gives weights to a
        server that lacks them.
        """
        self._cfg, self._fleet, self._stream, self._scorer, self._sampler = cfg, fleet, stream, scorer, sampler
        self._ranks, self._loop, self._republish = ranks, loop, republish
        self._flights: list[_Flight] = []  # in the order of uids
        self._next_uid = 0  # after the last one drawn
        self._stale = self._given_up = 0
        self.failed = False  # rollouts or graders have, which every rank knows

    def next(self, version: int) -> tuple[list[Group], int]:
        """Collective. This leader's groups (none on other ranks) for the step after `version`, and groups dropped here.

        Without oversampling a step takes the prompts drawn first, or the useful ones of them, so that a batch does not
        depend on layout or timing; with it those that are finished first. RolloutError when a request could not be
        served or a grader failed under policy `error`.
        """
        r = self._cfg.rollout
        wanted, early = r.prompts_per_step, r.oversample > 1
        ahead = min(r.max_staleness, self._cfg.train.steps - version - 1)
        self._give_up_stale(version - r.max_staleness)
        hopeful, most = wanted + math.ceil(wanted * (r.oversample - 1)), MAX_DRAWN * wanted
        self._draw_up_to(ahead * wanted + hopeful)
        self._start(version)
        reach = len(self._flights) if early else wanted  # how many of those under way may be taken
        while True:
            # an early batch has a successor for each dull group at once; any other must not know which one was first
            enough, least = (wanted, hopeful if reach < most else 0) if early else (reach, 0)
            self._wait_for(self._flights[:reach], enough, least, version)
            useful, dull = self._finished(self._flights[:reach])
            if len(useful) >= wanted:
                return self._take(set(useful[:wanted]), set(dull))
            if reach >= most:
                raise RolloutError(
                    f"of {reach} groups {len(useful)} have unequal rewards, {wanted} are wanted: the task is too easy "
                    "or too hard for the policy; change the data or set rollout.drop_zero_variance=false"
                )
            if len(useful) + len(dull) < reach:
                more = hopeful - (reach - len(dull))
            else:  # at the rate seen so far
                more = -(-(wanted - len(useful)) * reach // max(len(useful), 1))
            reach += min(more, 2 * wanted, most - reach)
            self._draw_up_to(reach)
            self._start(version)

    def state(self) -> dict[str, Any]:
        """What to resume from: the stream before the first prompt under way, and which of those after it are."""
        if not self._flights:
            return self._stream.state()
        uids = [flight.uid for flight in self._flights]
        return self._flights[0].stream_state | {"in_flight": uids, "next_uid": self._next_uid}

    def save(self, run_dir: Path, step: int) -> None:
        """Keep the groups that wait for their step, for the checkpoint of `step`; leaders do so each."""
        if self._ranks.is_leader:
            groups = (flight.group() for flight in self._flights if self._is_mine(flight))
            shard = (self._ranks.dp_rank, self._ranks.dp)
            waiting.write(run_dir, step, (group for group in groups if group is not None), shard=shard)

    def restore(self, state: dict[str, Any], run_dir: Path, step: int) -> None:
        """Go on from the checkpoint of `step`, with the groups that waited; others under way are sampled again."""
        self._stream.restore(state)
        under_way = set(state.get("in_flight", ()))
        self._flights = [flight for flight in self._drawn_until(state.get("next_uid")) if flight.uid in under_way]
        mine = {flight.uid: flight for flight in self._flights if self._is_mine(flight)}
        for group in waiting.read(run_dir, step, {uid: flight.prompt for uid, flight in mine.items()}):
            mine[group.uid].kept = group

    def discard_pending(self) -> None:
        """Give up what is in flight, for the weights that sample it are no more; its prompts are asked again."""
        for flight in self._flights:
            flight.give_up()

    def take_metrics(self) -> Metrics:
        """Graders' errors, groups given up, retries by cause and restarts of servers since the last call."""
        counts = {"groups/stale": Sum(float(self._stale)), "groups/given_up": Sum(float(self._given_up))}
        self._stale = self._given_up = 0
        return counts | self._scorer.take_metrics() | (self._fleet.take_metrics() if self._fleet is not None else {})

    # --- what is under way ---

    def _is_mine(self, flight: _Flight) -> bool:
        return self._ranks.is_leader and flight.uid % self._ranks.dp == self._ranks.dp_rank

    def _draw_up_to(self, number: int) -> None:
        while len(self._flights) < number:
            self._flights.append(self._draw())

    def _draw(self) -> _Flight:
        before = self._stream.state()
        uid, prompt = self._stream.next()
        self._next_uid = uid + 1
        return _Flight(uid, prompt, before)

    def _drawn_until(self, next_uid: int | None) -> list[_Flight]:
        drawn: list[_Flight] = []
        while next_uid is not None and (not drawn or drawn[-1].uid + 1 < next_uid):
            drawn.append(self._draw())
        return drawn

    def _give_up_stale(self, oldest: int) -> None:
        """Have groups sampled again that hold, or will hold, a token of weights older than version `oldest`.

        What has not answered yet began with the version that it was asked for at.
        """
        for flight in self._flights:
            group = flight.group()
            if group is not None:
                stale = min(s.completion.version_min for s in group.samples) < oldest
            else:
                stale = flight.future is not None and flight.started < oldest
            if stale:
                flight.give_up()
                self._stale += 1

    def _start(self, version: int) -> None:
        """Ask for this leader's prompts that nobody has asked for."""
        if self._sampler is None:
            return
        r = self._cfg.rollout
        places = {flight.uid: place for place, flight in enumerate(self._flights)}
        new = [f for f in self._flights if self._is_mine(f) and f.future is None and f.kept is None]
        # one request for the whole batch is the unit that a deterministic server repeats bit for bit
        for part in ([new] if r.repeatable else [[f] for f in new]) if new else []:
            step = version + 1 + min(places[part[0].uid] // r.prompts_per_step, r.max_staleness)
            routed = self._wants_routing(step, [f.uid * r.group_size + i for f in part for i in range(r.group_size)])
            future = self._loop.submit(self._sampler([(f.uid, f.prompt) for f in part], routed))
            for at, flight in enumerate(part):
                flight.future, flight.at, flight.started = future, at, version

    def _wants_routing(self, step: int, uids: list[int]) -> bool:
        """Whether the samples `uids` of a step are replayed, explained, or one of them traced."""
        routing, r = self._cfg.routing, self._cfg.rollout
        if self._cfg.algo.routing_replay == "R3":
            return True
        if routing.diagnose_every > 0:
            may_move = r.oversample > 1 or (r.drop_zero_variance and r.max_staleness > 0)  # to another step
            if may_move or step % routing.diagnose_every == 0:
                return True
        return any(is_traced(uid, routing.trace_rate, self._cfg.run.seed) for uid in uids)

    # --- what is finished ---

    def _is_useful(self, group: Group) -> bool:
        """Whether a step learns from it; groups of equal rewards teach nothing (DAPO, arXiv 2503.14476)."""
        return not self._cfg.rollout.drop_zero_variance or bool(np.ptp(group.rewards()) > 0)

    def _wait_for(self, flights: list[_Flight], enough: int, least: int, version: int) -> None:
        """Collective: until all of `flights` are finished, or useful ones among them are `enough`, or those that are
        useful or may become so are fewer than `least`."""
        mine = [flight for flight in flights if self._is_mine(flight)]
        futures = [flight.future for flight in mine if flight.future is not None]

        def progress() -> tuple[int, int]:
            groups = [group for flight in mine if (group := flight.group()) is not None]
            return len(mine) - len(groups), sum(self._is_useful(group) for group in groups)

        def finished(totals: list[int]) -> bool:
            return totals[0] == 0 or totals[1] >= enough or sum(totals) < least

        self._poll(futures, progress, finished, version)

    def _finished(self, flights: list[_Flight]) -> tuple[list[int], list[int]]:
        """Collective: the uids of all ranks' finished groups that are useful, and that are not, in order."""
        found = [(f.uid, self._is_useful(g)) for f in flights if self._is_mine(f) and (g := f.group()) is not None]
        known = sorted(one for part in self._ranks.gather(found) for one in part)
        return [uid for uid, useful in known if useful], [uid for uid, useful in known if not useful]

    def _take(self, chosen: set[int], dull: set[int]) -> tuple[list[Group], int]:
        """The chosen groups; what else is finished and dull goes, and at max_staleness 0 everything else, too."""
        groups, rest, dropped = [], [], 0
        for flight in self._flights:
            group = flight.group() if self._is_mine(flight) else None
            if flight.uid in chosen:
                groups += [group] if group is not None else []
            elif flight.uid in dull:
                dropped += group is not None
            elif self._cfg.rollout.max_staleness:
                rest.append(flight)
            elif self._is_mine(flight):
                dropped, self._given_up = dropped + (group is not None), self._given_up + (group is None)
                flight.give_up()
        self._flights = rest
        return groups, dropped

    def wait(self, future: Future[T], version: int) -> T:
        """Collective: wait for every rank's future, giving restarted servers their weights meanwhile."""
        self._poll([future], lambda: (not future.done(), 0), lambda totals: totals[0] == 0, version)
        return future.result()

    def _poll(
        self,
        futures: Sequence[Future[Any]],
        progress: Callable[[], tuple[int, int]],
        finished: Callable[[list[int]], bool],
        version: int,
    ) -> None:
        """Collective: until `finished` of the sums of all ranks' `progress`; one that failed fails every rank, as does
        the end of all servers, which the rank that owns them knows of, where a rank still waits.
        """
        while True:
            wait(futures, timeout=POLL_S)
            error = next((f.exception() for f in futures if f.done() and f.exception() is not None), None)
            lacking = self._fleet is not None and self._fleet.stale()
            ended = self._fleet.failure if self._fleet is not None else None
            own = (0, 0) if error is not None else progress()
            flags = torch.tensor([*own, error is not None, ended is not None, lacking], dtype=torch.int64)
            dist.all_reduce(flags, group=self._ranks.world_group_cpu)
            *totals, failures, ends, stale = flags.tolist()
            if not failures and finished(totals):
                return
            if failures or ends:
                self.failed = True
                error = error or ended
                if error is not None:
                    raise error
                raise RolloutError("rollouts failed on another rank; its message is in that rank's output")
            if stale:
                self._republish(version)
