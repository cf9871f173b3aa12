"""The rollout source without servers: refills, seeds, what survives a resume, failures that reach every rank."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megasapo import config
from megasapo.metrics import scalars
from megasapo.rewards.model import Scored
from megasapo.rollout import source as source_module
from megasapo.rollout import waiting
from megasapo.rollout.episode import Completer
from megasapo.rollout.loop import LoopThread
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.sampler import Sampler
from megasapo.rollout.source import RolloutSource
from megasapo.routing.trace import is_traced
from megasapo.types import Completion, Group, Prompt, Sample, SamplingParams


class Stream:
    """Prompts 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.drawn = 0

    def next(self) -> tuple[int, Prompt]:
        self.drawn += 1
        return self.drawn - 1, Prompt(self.drawn - 1, (self.drawn - 1, 2), "p", "a")

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class Fleet:
    """Answers every request with one token; `fail` makes it raise."""

    def __init__(self) -> None:
        self.requests: list[list[SamplingParams]] = []
        self.routed: list[bool] = []
        self.asked: list[int] = []
        self.fail = False
        self.hang: Callable[[int], bool] = lambda first: False  # of the first token of a prompt
        self.hanging = self.cancelled = 0
        self.version = 0
        self.failure: Exception | None = None

    async def generate(
        self, inputs: list[tuple[int, ...]], sampling: list[SamplingParams], *, return_routed_experts: bool
    ) -> list[Completion]:
        if self.fail:
            raise RolloutError("no server")
        if self.hang(inputs[0][0]):
            self.hanging += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        self.requests.append(sampling)
        self.asked.append(inputs[0][0])
        self.routed.append(return_routed_experts)
        return [Completion((7,), np.zeros(1, np.float32), "stop", self.version, self.version) for _ in inputs]

    def stale(self) -> bool:
        return False

    def take_metrics(self) -> dict[str, Any]:
        return {}


class Scorer:
    """Every `rare`-th prompt has unequal rewards."""

    def __init__(self, rare: int) -> None:
        self._rare, self._asked = rare, 0

    async def score(self, prompt: Prompt, response: str) -> Scored:
        self._asked += 1  # of a group of two one is right
        return Scored(float(prompt.index % self._rare == 0 and self._asked % 2), {})

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
    group = dist.group.WORLD
    ranks = SimpleNamespace(dp=1, dp_rank=0, is_leader=True, world_group_cpu=group, gather=lambda own: [own])
    stream, fleet = Stream(), Fleet()
    scorer: Any = Scorer(rare)
    complete = Completer(fleet, cfg.rollout, lambda ids: "x", lambda text: [], version=lambda: 0)
    parts: list[Any] = [cfg, fleet, stream, scorer, Sampler(cfg, complete, scorer, lambda ids: "x"), ranks, thread]
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


def test_groups_that_wait_come_back_after_a_resume_and_others_are_asked_again(
    world: None, thread: LoopThread, tmp_path: Path
) -> None:
    source, stream, fleet = make(thread, max_staleness=2)
    fleet.hang = lambda first: first in (9, 20)
    first, _ = source.next(version=0)
    assert [g.uid for g in first] == list(range(8))
    assert stream.drawn == 24  # two more batches are under way
    until(lambda: len(fleet.requests) == 22 and fleet.hanging == 2)
    until(lambda: sum(f.group() is not None for f in source._flights) == 14)
    state = json.loads(json.dumps(source.state()))
    source.save(tmp_path, step=1)
    other, restored, again = make(thread, max_staleness=2)
    other.restore(state, tmp_path, step=1)
    assert restored.drawn == 24
    assert [g.uid for g in other.next(version=1)[0]] == list(range(8, 16))
    until(lambda: len(again.requests) == 2 + 8)  # those two, and another batch
    assert again.asked[:2] == [9, 20]
    assert [g.uid for g in other.next(version=2)[0]] == list(range(16, 24))


def test_a_waiting_group_is_read_as_it_was_written(tmp_path: Path) -> None:
    routed = np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    completion = Completion(
        (7, 8, 9),
        np.array([-0.5, 0, -1], np.float32),
        "length",
        3,
        4,
        routed,
        ((3, 0, 1), (4, 2, 3)),
        np.array([True, False, True]),
    )
    prompt = Prompt(5, (1, 2), "p", "a")
    waiting.write(tmp_path, 4, [Group(6, prompt, (Sample(completion, "x y", 0.5, {"math": 0.5}),))], shard=(1, 2))
    assert waiting.read(tmp_path, 3, {6: prompt}) == waiting.read(tmp_path, 4, {7: prompt}) == []
    [group] = waiting.read(tmp_path, 4, {6: prompt})
    [sample] = group.samples
    assert (group.uid, group.prompt, sample.text, sample.reward) == (6, prompt, "x y", 0.5)
    assert sample.reward_parts == {"math": 0.5}
    for field in dataclasses.fields(Completion):
        np.testing.assert_array_equal(getattr(sample.completion, field.name), getattr(completion, field.name))


@pytest.mark.parametrize("damage", ["flip", "cut", "binary", "without digest"])
def test_a_damaged_waiting_group_is_left_out_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def group(uid: int) -> Group:
        completion = Completion((7, 8), np.array([-0.5, -1], np.float32), "stop", 3, 3)
        return Group(uid, prompt, (Sample(completion, "x", 0.5, {}),))

    prompt = Prompt(5, (1, 2), "p", "a")
    waiting.write(tmp_path, 4, map(group, (6, 7)), shard=(0, 1))
    path = tmp_path / "in_flight" / "step_00000004.jsonl"
    first, second = path.read_bytes().splitlines()
    worse = {
        "flip": second.replace(b'"reward": 0.5', b'"reward": 0.7'),
        "cut": second[:-9],
        "binary": b"\xff\x00" + second,
        "without digest": b"{" + second[79:],
    }
    assert worse[damage] != second
    path.write_bytes(first + b"\n" + worse[damage])
    assert [found.uid for found in waiting.read(tmp_path, 4, {6: prompt, 7: prompt})] == [6]
    assert f"{path} is damaged: the groups of 1 of its lines are sampled again" in caplog.text


def test_waiting_groups_stay_as_long_as_their_checkpoint(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        waiting.write(tmp_path, step, [], shard=(0, 1))
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        if step == 6:
            (tmp_path / "checkpoints" / "step_00000004").rmdir()
    found = sorted(p.name for p in (tmp_path / "in_flight").iterdir())
    assert found == [f"step_{step:08d}.jsonl" for step in (2, 6, 8)]


def test_a_step_that_is_taken_again_in_another_layout_leaves_nothing_of_the_first_try(tmp_path: Path) -> None:
    def names() -> list[str]:
        return sorted(p.name for p in (tmp_path / "in_flight").iterdir())

    for shard in ((0, 2), (1, 2), (0, 1)):
        waiting.write(tmp_path, 4, [], shard=shard)
    assert names() == ["step_00000004.jsonl"]
    for index in range(12):
        waiting.write(tmp_path, 4, [], shard=(index, 12))
    assert names() == sorted(f"step_00000004.part-{index}-of-12.jsonl" for index in range(12))
    waiting.write(tmp_path, 4, [], shard=(0, 2))
    assert names() == ["step_00000004.part-0-of-2.jsonl"]


def test_an_oversampled_step_takes_what_is_finished_first(world: None, thread: LoopThread) -> None:
    source, stream, fleet = make(thread, max_staleness=1, oversample=1.25)
    fleet.hang = lambda first: first in (0, 3)
    groups, _ = source.next(version=0)
    assert stream.drawn == 18  # two steps' and a quarter of one
    assert len(groups) == 8
    assert not {g.uid for g in groups} & {0, 3}
    fleet.hang, fleet.version = (lambda first: False), 1
    source.next(version=1)  # 0 and 3 go on, for they may hold tokens of version 0
    assert not fleet.cancelled
    assert {0, 3} < {f.uid for f in source._flights}
    source.next(version=2)  # and now may not
    until(lambda: fleet.cancelled == 2 and {0, 3} <= set(fleet.asked))
    assert scalars(source.take_metrics())["groups/stale"] >= 2
    assert fleet.asked.count(0) == fleet.asked.count(3) == 1  # answered now


def test_a_finished_group_that_has_become_too_old_is_sampled_again(world: None, thread: LoopThread) -> None:
    source, _, fleet = make(thread, max_staleness=1, oversample=1.25)
    source.next(version=0)
    until(lambda: all(f.group() is not None for f in source._flights))
    old = [f.uid for f in source._flights]
    fleet.version = 2
    groups, _ = source.next(version=2)
    assert scalars(source.take_metrics())["groups/stale"] == len(old) == 10
    assert all(s.completion.version_min == 2 for g in groups for s in g.samples)


def test_the_end_of_all_servers_ends_a_wait_but_no_batch_that_is_complete(
    world: None, thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that owns the servers, whose own requests may be done, knows it before those that others repeat."""
    source, _, fleet = make(thread)
    fleet.failure = RolloutError("the last server is out of restarts")
    with monkeypatch.context() as patch:
        patch.setattr(source_module, "POLL_S", 60.0)  # the batch is complete when it looks
        assert len(source.next(version=0)[0]) == 8
    assert not source.failed
    fleet.hang = lambda first: True
    with pytest.raises(RolloutError, match="the last server is out of restarts"):
        source.next(version=1)
    assert source.failed


def test_without_staleness_an_oversampled_step_gives_the_rest_up(world: None, thread: LoopThread) -> None:
    source, stream, fleet = make(thread, deterministic=False, oversample=1.5)
    fleet.hang = lambda first: first < 4
    groups, dropped = source.next(version=0)
    assert ([g.uid for g in groups], dropped, stream.drawn) == (list(range(4, 12)), 0, 12)
    until(lambda: fleet.cancelled == 4)
    assert scalars(source.take_metrics())["groups/given_up"] == 4
    assert source.state() == {"drawn": 12}


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_oversampled_step_refills_while_others_are_under_way(
    world: None, thread: LoopThread, staleness: int
) -> None:
    """Every second group is dull and gets a successor, though one group never comes."""
    source, stream, fleet = make(
        thread, rare=2, oversample=1.25, drop_zero_variance=True, deterministic=False, max_staleness=staleness
    )
    fleet.hang = lambda first: first == 6
    uids = [g.uid for g in source.next(version=0)[0]]
    assert len(uids) == 8
    assert not [uid for uid in uids if uid % 2 or uid == 6]
    assert stream.drawn <= 2 * 10 + 8 * staleness


def test_a_closed_loop_leaves_no_task_behind() -> None:
    ended = []

    async def wait_for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    loop = LoopThread()
    future = loop.submit(wait_for_ever())
    until(lambda: bool(asyncio.all_tasks(loop._loop)))
    loop.close()
    assert ended == [True]
    assert future.cancelled()
    assert loop._loop.is_closed()


def test_with_staleness_a_step_refills_from_what_is_under_way(world: None, thread: LoopThread) -> None:
    source, stream, _ = make(thread, rare=2, max_staleness=1, drop_zero_variance=True)
    assert [g.uid for g in source.next(version=0)[0]] == list(range(0, 16, 2))
    assert stream.drawn == 16
    assert [g.uid for g in source.next(version=1)[0]] == list(range(16, 32, 2))


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
    for fleet.version in range(6):
        source.next(fleet.version)
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
    fleet.hang = lambda first: True
    source.next(version=1)  # its batch was answered before
    assert stream.drawn == 32  # 16 of them in flight, the last 8 without an answer
    until(lambda: fleet.hanging == 8)
    before = source.state()
    source.discard_pending()
    assert source.state() == before
    assert (before["drawn"], before["in_flight"], before["next_uid"]) == (16, list(range(16, 32)), 32)
    until(lambda: fleet.cancelled == 8)  # one request a group
    fleet.hang = lambda first: False
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
