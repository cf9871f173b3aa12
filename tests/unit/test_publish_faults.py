"""Publishing to servers that are killed, refuse or fail midway: none samples with weights that it has not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from megasapo.publish import Bucket
from megasapo.rollout.client import ServerClient
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.online import OnlineDelivery
from megasapo.rollout.protocol import INCOMPLETE, RolloutError
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams
from tests.unit.publishing import (
    GREEDY,
    ONLINE,
    PROMPTS,
    TIMEOUT_S,
    export_of,
    generate,
    greedy_by_transformers,
    memory_in_use,
    older,
    publisher,
    tokens,
    wait_until,
)


def test_a_server_that_is_restarted_between_two_buckets_is_sent_all_of_them(dirs: list[Path], tmp_path: Path) -> None:
    """Without sessions it takes the rest as if it had the beginning."""
    with Fleet.start(older(), dirs[0], tmp_path) as fleet:
        server, kills = fleet.servers[0], [signal.SIGKILL]

        def export() -> Iterator[Bucket]:
            for bucket in export_of(dirs[1]):
                yield bucket
                if kills:
                    process, started, delivery = server.process, server.incarnation, p._delivery
                    assert process is not None
                    assert isinstance(delivery, OnlineDelivery)
                    futures.wait(delivery._on_the_way)
                    [running] = psutil.Process(process.pid).children()  # the guard's
                    running.send_signal(kills.pop())
                    wait_until(lambda started=started: server.incarnation != started)  # type: ignore[misc]

        p = publisher(fleet, dirs[1], dirs, tmp_path, "tensor", export=export, verify=False)
        p(1)
        assert tokens(generate(fleet)) == greedy_by_transformers(dirs[1])
        p.close()


@ONLINE
def test_a_session_that_a_killed_learner_left_open_is_closed(
    fleet: Fleet, dirs: list[Path], tmp_path: Path, method: str
) -> None:
    assert fleet.run(fleet.control(fleet.servers[0]).begin_update())
    p = publisher(fleet, dirs[0], dirs, tmp_path, method)
    p(6)
    assert {c.version_min for c in generate(fleet)} == {6}
    p.close()


def test_a_server_killed_in_the_middle_of_a_request_loses_nothing(
    fleet: Fleet, dirs: list[Path], tmp_path: Path
) -> None:
    """After a publish to disk the restarted server gets the weights by itself and the request ends as if unharmed."""
    p = publisher(fleet, dirs[1], dirs, tmp_path, "disk")
    p(7)
    prompts, sampling = [*PROMPTS, (9,)], [GREEDY, GREEDY, replace(GREEDY, max_new_tokens=700)]

    async def ask() -> list[Completion]:
        completions = await fleet.generate(prompts, sampling)
        await fleet.close()
        return completions

    undisturbed = asyncio.run(ask())
    process = fleet.servers[0].process
    assert process is not None

    async def kill_midway() -> list[Completion]:
        server = fleet.control(fleet.servers[0])
        fleet.run(server.pause("in_place"))  # what it is asked now stays with it
        request = asyncio.create_task(ask())
        while not fleet.run(server.server_info())["internal_states"][0]["num_waiting_reqs"]:
            await asyncio.sleep(0.01)
        assert not request.done()
        os.kill(process.pid, signal.SIGKILL)
        return await request

    fleet.take_metrics()
    after = asyncio.run(kill_midway())
    assert tokens(after) == tokens(undisturbed)
    assert [c.logprobs.tolist() for c in after] == [c.logprobs.tolist() for c in undisturbed]
    assert {c.version_min for c in after} == {7}
    assert fleet.take_metrics()["rollout/server_restarts"].value() == 1


@ONLINE
def test_without_a_directory_a_restarted_server_is_stale_until_the_next_publish(
    fleet: Fleet, dirs: list[Path], tmp_path: Path, method: str
) -> None:
    p = publisher(fleet, dirs[1], dirs, tmp_path, method)
    p(8)
    expected = generate(fleet)
    process = fleet.servers[0].process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    wait_until(fleet.stale)
    assert not fleet.servers[0].ready  # it is up with the weights it was started with
    p(8)
    assert not fleet.stale()
    assert tokens(generate(fleet)) == tokens(expected)
    p.close()


@ONLINE
def test_a_publish_that_fails_midway_is_sent_again(
    fleet: Fleet, dirs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sent, stamps = [], []
    real, real_stamp = OnlineDelivery.send, ServerClient.stamp

    def fail_once(self: OnlineDelivery, bucket: Bucket) -> None:
        sent.append(len(bucket))
        real(self, bucket)
        if len(sent) == 2:
            raise RolloutError("scripted")

    async def stamp(self: ServerClient, version: int | str) -> None:
        stamps.append(version)
        await real_stamp(self, version)

    monkeypatch.setattr(OnlineDelivery, "send", fail_once)
    monkeypatch.setattr(ServerClient, "stamp", stamp)
    before = memory_in_use()
    p = publisher(fleet, dirs[0], dirs, tmp_path, method)
    p(9)
    buckets = len(list(export_of(dirs[0])))
    assert len(sent) == 2 + buckets
    assert stamps == [INCOMPLETE, 9]
    assert memory_in_use() <= before
    assert tokens(generate(fleet)) == greedy_by_transformers(dirs[0])
    p.close()


@ONLINE
def test_a_server_that_fails_at_the_end_of_a_publish_is_left_out_until_the_next(
    dirs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    cfg = RolloutConfig(spawn=2, server_args=("--threads", "1"), start_timeout_s=TIMEOUT_S, deterministic=False)
    with Fleet.start(cfg, dirs[0], tmp_path) as fleet:
        real, failing = ServerClient.end_update, [fleet.urls[1]]

        async def end_update(self: ServerClient) -> None:
            if self.url in failing:
                raise RolloutError("scripted")
            await real(self)

        monkeypatch.setattr(ServerClient, "end_update", end_update)
        p = publisher(fleet, dirs[1], dirs, tmp_path, method)
        p(5)
        assert [s.ready for s in fleet.servers] == [True, False]
        assert {c.version_min for c in generate(fleet)} == {5}
        wait_until(fleet.stale)  # it says that it holds parts of two versions
        failing.clear()
        fleet.run(fleet.control(fleet.servers[1]).end_update())
        p(5)
        assert [s.ready for s in fleet.servers] == [True, True]
        p.close()


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(
    fleet: Fleet, dirs: list[Path], tmp_path: Path
) -> None:
    good = publisher(fleet, dirs[1], dirs, tmp_path, "disk")
    good(10)
    before = generate(fleet)

    def wrong() -> Iterator[Bucket]:
        yield [("model.embed_tokens.weight", torch.zeros(3, 3))]

    with pytest.raises(RolloutError, match=r"version 11 was not published in 3 attempts.*embed_tokens"):
        publisher(fleet, dirs[1], dirs, tmp_path / "other", "disk", export=wrong)(11)
    assert fleet.version == 10
    wait_until(lambda: fleet.servers[0].ready)
    assert tokens(generate(fleet)) == tokens(before)


def test_a_server_that_refuses_an_update_is_not_sampled_from(dirs: list[Path], tmp_path: Path) -> None:
    """Two servers, one of which refuses: the version is published, and requests go to the other only."""
    fake = str(Path(__file__).with_name("fake_server.py"))
    launch = f'if mkdir "{tmp_path}/first"; then exec "$@"; fi; exec "$@" --refuse-updates'  # mkdir: only one succeeds
    cfg = RolloutConfig(
        engine="sglang",
        spawn=2,
        spawn_command=("bash", "-c", launch, "bash", sys.executable, fake, "{port}"),
        start_timeout_s=TIMEOUT_S,
        deterministic=False,
    )
    with Fleet.start(cfg, dirs[0], tmp_path / "run") as fleet:
        publisher(fleet, dirs[1], dirs, tmp_path, "disk", verify=False)(3)
        assert sorted(s.ready for s in fleet.servers) == [False, True]
        one = SamplingParams(max_new_tokens=1)

        async def run() -> list[Completion]:
            completions = await fleet.generate([(i,) for i in range(1, 9)], [one] * 8)
            await fleet.close()
            return completions

        assert {c.version_min for c in asyncio.run(run())} == {3}
        assert "rollout/wrong_version" not in fleet.take_metrics()
