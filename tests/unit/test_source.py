"""The rollout source without servers: refills, seeds, what survives a resume, failures that reach every rank."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megasapo import config
from megasapo.rewards.model import Scored
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.source import LoopThread, RolloutSource
from megasapo.routing.trace import is_traced
from megasapo.types import Completion, Prompt, SamplingParams


class Stream:
    """Prompts 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.drawn = 0

    def next(self) -> tuple[int, Prompt]:
        self.drawn += 1
        return self.drawn - 1, Prompt(self.drawn - 1, (1, 2), "p", "a")

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class Fleet:
    """Answers every request with one token; `fail` makes it raise."""

    def __init__(self) -> None:
        self.requests: list[list[SamplingParams]] = []
        self.routed: list[bool] = []
        self.fail = False
        self.hang = False
        self.hanging = self.cancelled = 0

    async def generate(
        self, inputs: list[tuple[int, ...]], sampling: list[SamplingParams], *, return_routed_experts: bool
    ) -> list[Completion]:
        if self.fail:
            raise RolloutError("no server")
        if self.hang:
            self.hanging += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        self.requests.append(sampling)
        self.routed.append(return_routed_experts)
        return [Completion((7,), np.zeros(1, np.float32), "stop", 0, 0) for _ in inputs]

    def stale(self) -> bool:
        return False

    def take_metrics(self) -> dict[str, Any]:
        return {}


class Scorer:
    """Every `rare`-th prompt has unequal rewards."""

    def __init__(self, rare: int) -> None:
        self._rare = rare

    async def score_group(self, prompt: Prompt, responses: list[str]) -> list[Scored]:
        useful = prompt.index % self._rare == 0
        return [Scored(float(useful and i == 0), {}) for i in range(len(responses))]

    def take_metrics(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.close()


def make(
    thread: LoopThread, *, rare: int = 1, over: tuple[str, ...] = (), **rollout: Any
) -> tuple[RolloutSource, Stream, Fleet]:
    settings = {"prompts_per_step": 8, "group_size": 2, "max_new_tokens": 4} | rollout
    cfg = config.from_dict({"model": {"path": "m"}, "rollout": settings, "train": {"steps": 10}}, over)
    ranks = SimpleNamespace(dp=1, dp_rank=0, is_leader=True, world_group_cpu=dist.group.WORLD)
    stream, fleet = Stream(), Fleet()
    parts: list[Any] = [cfg, fleet, stream, Scorer(rare), lambda ids: "x", ranks, thread]
    return RolloutSource(*parts, republish=lambda version: None), stream, fleet


@pytest.mark.parametrize("rare", [2, 5, 15])
def test_refills_until_the_batch_is_full_of_the_first_useful_groups(world: None, thread: LoopThread, rare: int) -> None:
    source, stream, _ = make(thread, rare=rare, drop_zero_variance=True)
    groups, dropped = source.next(version=0)
    assert [g.uid for g in groups] == [rare * i for i in range(8)]
    assert dropped == stream.drawn - 8


def test_gives_up_on_a_task_without_useful_groups(world: None, thread: LoopThread) -> None:
    source, stream, _ = make(thread, rare=10**6, drop_zero_variance=True)
    with pytest.raises(RolloutError, match="of 160 groups 1 have unequal rewards, 8 are wanted"):
        source.next(version=0)
    assert stream.drawn == 160


def test_a_repeatable_run_sends_one_seeded_request_a_step(world: None, thread: LoopThread) -> None:
    source, _, fleet = make(thread)
    source.next(version=0)
    again, _, same = make(thread)
    again.next(version=0)
    assert len(fleet.requests) == 1
    assert fleet.requests == same.requests
    seeds = [s.sampling_seed for s in fleet.requests[0]]
    assert None not in seeds
    assert len(set(seeds)) == 16


@pytest.mark.parametrize("free", [{"deterministic": False}, {"max_staleness": 1}, {"engine": "sglang"}])
def test_other_runs_send_each_group_by_itself_unseeded(world: None, thread: LoopThread, free: dict[str, Any]) -> None:
    source, _, fleet = make(thread, **free)
    source.next(version=0)
    assert all(len(request) == 2 for request in fleet.requests)
    assert {s.sampling_seed for request in fleet.requests for s in request} == {None}


def test_batches_in_flight_are_drawn_again_after_a_resume(world: None, thread: LoopThread) -> None:
    source, stream, _ = make(thread, max_staleness=2)
    first, _ = source.next(version=0)
    assert [g.uid for g in first] == list(range(8))
    assert stream.drawn == 24  # two more batches are under way
    other, restored, _ = make(thread, max_staleness=2)
    other.restore(source.state())
    assert restored.drawn == 8
    assert [g.uid for g in other.next(version=1)[0]] == list(range(8, 16))


@pytest.mark.parametrize(
    ("over", "asked"),
    [
        ((), [False] * 6),
        (("algo.routing_replay=R2",), [False] * 6),
        (("algo.routing_replay=R3",), [True] * 6),
        (("routing.diagnose_every=3",), [False, False, True, False, False, True]),  # steps 1 to 6
        (("routing.trace_rate=1.0",), [True] * 6),
    ],
)
@pytest.mark.parametrize("staleness", [0, 2])
def test_routing_is_asked_for_where_a_step_uses_it(
    world: None, thread: LoopThread, over: tuple[str, ...], asked: list[bool], staleness: int
) -> None:
    source, _, fleet = make(thread, over=(*over, "train.steps=6"), max_staleness=staleness, prompts_per_step=1)
    for version in range(6):
        source.next(version)
    assert fleet.routed == asked


def test_only_groups_of_the_trace_are_asked_for(world: None, thread: LoopThread) -> None:
    source, _, fleet = make(thread, over=("routing.trace_rate=0.2", "run.seed=3"), deterministic=False)
    source.next(version=0)
    expected = [any(is_traced(2 * group + i, 0.2, seed=3) for i in range(2)) for group in range(8)]
    assert fleet.routed == expected
    assert 0 < sum(expected) < 8


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_discarded_batches_are_cancelled_and_drawn_again(world: None, thread: LoopThread) -> None:
    source, stream, fleet = make(thread, max_staleness=2)
    source.next(version=0)
    until(lambda: len(fleet.requests) == 24)
    fleet.hang = True
    source.next(version=1)  # its batch was answered before
    assert stream.drawn == 32  # 16 of them in flight, the last 8 without an answer
    until(lambda: fleet.hanging == 8)
    before = source.state()
    source.discard_pending()
    assert source.state() == before == {"drawn": 16}
    until(lambda: fleet.cancelled == 8)  # one request a group
    fleet.hang = False
    assert [g.uid for g in source.next(version=1)[0]] == list(range(16, 24))


def test_nothing_is_drawn_beyond_the_last_step(world: None, thread: LoopThread) -> None:
    source, stream, _ = make(thread, max_staleness=4)
    source.next(version=8)
    source.next(version=9)
    assert stream.drawn == 16


def test_a_failed_request_ends_the_step_with_its_message(world: None, thread: LoopThread) -> None:
    source, _, fleet = make(thread)
    fleet.fail = True
    with pytest.raises(RolloutError, match="no server"):
        source.next(version=0)
