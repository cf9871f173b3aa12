"""Servers that are killed, hang, answer wrongly or not at all: the samples are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megasapo.rollout.client import ServerClient
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import Retryable
from megasapo.sections import RolloutConfig
from tests.dist.launcher import free_ports
from tests.unit.load import Servers, check, ideal_s, model, requests, serving

NUMBER, LONGEST = 160, 120
SPEED = "--tokens-per-s=400"
TIMEOUT_S = 120.0  # of what hangs


def start(urls: list[str], directory: Path, **over: Any) -> Fleet:
    patience = {"retry_for_s": TIMEOUT_S, "start_timeout_s": TIMEOUT_S}
    settings = {"deterministic": False, "max_in_flight": 48, **patience, **over}
    fleet = Fleet.start(RolloutConfig(servers=tuple(urls), **settings), model(directory / "model"), directory)
    fleet.version = 7
    return fleet


def sample(fleet: Fleet, disturb: Callable[[], None] | None = None, number: int = NUMBER) -> None:
    """Ask for everything, call `disturb` once the first server has something to do, and check every answer.

    No answer is read while `disturb` lasts: most of the requests are still to be made.
    """
    prompts, sampling = requests(number, 20, LONGEST, group=4)

    async def run() -> None:
        work = asyncio.create_task(fleet.generate(prompts, sampling))
        if disturb is not None:
            while not fleet.servers[0].outstanding_tokens:
                await asyncio.sleep(0.01)
            disturb()
        check(await work, prompts, sampling)
        await fleet.close()

    asyncio.run(run())
    assert [s.outstanding_tokens for s in fleet.servers] == [0] * len(fleet.servers)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def counts(fleet: Fleet) -> dict[str, float]:
    return {name.removeprefix("rollout/"): m.value() for name, m in fleet.take_metrics().items()}


@pytest.mark.parametrize(
    ("fault", "every", "counted"),
    [
        ("error", 1, "unreachable"),
        ("drop", 10, "unreachable"),
        ("wrong", 2, "wrong_version"),
        ("truncated", 2, "bad_answer"),
        ("nan", 2, "bad_answer"),
        ("slow", 1, None),
    ],
)
def test_wrong_answers_are_asked_for_again(tmp_path: Path, fault: str, every: int, counted: str | None) -> None:
    with serving(Servers(SPEED, f"--fault={fault}", f"--every={every}"), Servers(SPEED, ports=2)) as urls:
        with start(urls, tmp_path) as fleet:
            sample(fleet)
            seen = counts(fleet)
    expected = {"retries", counted, "server_restarts"} if counted else {"server_restarts"}
    assert set(seen) == expected
    assert seen["server_restarts"] == 0


def test_ten_percent_of_all_connections_are_dropped(tmp_path: Path) -> None:
    with serving(Servers(SPEED, "--fault=drop", "--every=10", ports=3)) as urls, start(urls, tmp_path) as fleet:
        sample(fleet)
        assert counts(fleet)["unreachable"] >= NUMBER // 10 - 3


def test_a_url_that_ends_with_a_slash_has_one_client_too(tmp_path: Path) -> None:
    """Where a server hangs, that client's connections are closed, which ends whatever waits for it."""
    with serving(Servers(SPEED)) as [url], start([f"{url}/"], tmp_path) as fleet:
        [server] = fleet.servers
        assert fleet.control(server) is fleet.control(server)
        sample(fleet, number=8)


def test_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    first = Servers(SPEED)
    with serving(first, Servers(SPEED, ports=2)) as urls, start(urls, tmp_path) as fleet:
        sample(fleet, first.kill)
        assert counts(fleet)["unreachable"] >= 1
        assert fleet.servers[0].state in ("suspect", "dead")


def test_a_server_that_hangs_is_found_out_long_before_its_requests_time_out(tmp_path: Path) -> None:
    first = Servers(SPEED)
    with serving(first, Servers(SPEED, ports=2)) as urls:
        with start(urls, tmp_path, health_timeout_s=5.0, request_timeout_s=100_000.0) as fleet:
            sample(fleet, lambda: os.kill(first.process.pid, signal.SIGSTOP))
            assert fleet.servers[0].state == "dead"
            assert counts(fleet)["unreachable"] >= 1


def test_a_call_that_waits_for_a_hanging_server_ends_when_that_is_found_out(tmp_path: Path) -> None:
    first = Servers(SPEED)
    with serving(first) as urls:
        with start(urls, tmp_path, health_timeout_s=2.0, request_timeout_s=100_000.0) as fleet:
            os.kill(first.process.pid, signal.SIGSTOP)
            with pytest.raises(Retryable, match="ServerDisconnectedError"):
                fleet.run(fleet.control(fleet.servers[0]).stamp(8))


def test_a_server_that_hangs_while_it_loads_holds_up_no_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, loading = Servers(SPEED), threading.Event()
    load = ServerClient.load_from_disk

    async def hang(self: ServerClient, *args: Any) -> None:
        os.kill(first.process.pid, signal.SIGSTOP)
        loading.set()
        await load(self, *args)

    monkeypatch.setattr(ServerClient, "load_from_disk", hang)
    with serving(first) as urls:
        with start(urls, tmp_path, health_timeout_s=2.0, request_timeout_s=100_000.0) as fleet:
            fleet.begin_publish()
            fleet.end_publish(8, [], tmp_path)
            assert loading.wait(TIMEOUT_S)
            publishing = threading.Thread(target=fleet.begin_publish, daemon=True)
            publishing.start()
            publishing.join(TIMEOUT_S)
            assert not publishing.is_alive()
            assert not fleet.servers[0].ready


def test_a_leader_that_only_connected_finds_out_too(tmp_path: Path) -> None:
    first = Servers(SPEED)
    with serving(first, Servers(SPEED)) as urls:
        cfg = RolloutConfig(deterministic=False, health_timeout_s=5.0, request_timeout_s=100_000.0, max_in_flight=48)
        with Fleet.connect(cfg, urls, model(tmp_path), leader_index=1) as fleet:
            fleet.version = 7
            sample(fleet, lambda: os.kill(first.process.pid, signal.SIGSTOP), number=80)


def test_all_servers_go_and_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And an operator reads so, once for each server."""
    first = Servers(SPEED, again_at=free_ports(2))  # which nobody takes meanwhile, as one that the kernel chose
    later: list[Servers] = []

    def come_back() -> None:
        wait_until(lambda: not any(s.up for s in fleet.servers))
        later.append(Servers(SPEED, again_at=first.ports))

    def gone_and_back() -> None:
        first.kill()
        coming.start()

    coming = threading.Thread(target=come_back)
    try:
        with serving(first) as urls, start(urls, tmp_path) as fleet:
            sample(fleet, gone_and_back)
            coming.join()
            assert counts(fleet)["unreachable"] >= 1
            wait_until(lambda: all(s.ready for s in fleet.servers))
            said = [r.getMessage() for r in caplog.records if r.name == "megasapo.rollout.watch"]
            assert {s.trouble for s in fleet.servers} == {""}
    finally:
        for servers in later:
            servers.kill()
    for i in range(2):
        own = [line for line in said if f"rollout server {i} " in line]
        # the latter where it was killed between answering a question and generating a token
        assert re.search(r"(does not answer|generates nothing), its requests go elsewhere", own[0])
        assert own[1] == f"rollout server {i} is ready again"


def test_a_straggler_is_hedged_and_its_request_aborted(tmp_path: Path) -> None:
    """Every request to the first server is never answered; each goes to another one too, and counts once.

    An abort may be of a second try that was over before it was sent.
    """
    with serving(Servers(SPEED, "--fault=forever"), Servers(SPEED, ports=2)) as urls:
        with start(urls, tmp_path, hedge_after_s=1.0, request_timeout_s=100_000.0) as fleet:
            sample(fleet, number=80)
            info = fleet.run(fleet.control(fleet.servers[0]).server_info())
            seen = counts(fleet)
    assert info["requests"] >= 1
    assert len(set(info["aborted"])) == len(info["aborted"])
    assert set(info["aborted"]) >= set(info["rids"])
    assert seen["hedged"] >= info["requests"]
    assert "retries" not in seen


def test_a_group_goes_to_one_server_and_groups_are_spread(tmp_path: Path) -> None:
    with serving(Servers(SPEED, ports=4)) as urls, start(urls, tmp_path, max_in_flight=160) as fleet:
        sample(fleet)
        firsts = [fleet.run(fleet.control(s).server_info())["firsts"] for s in fleet.servers]
    assert sum(map(len, firsts)) == NUMBER // 4  # no group was seen by two servers
    assert min(map(len, firsts)) >= 5


def test_hundreds_in_flight(tmp_path: Path) -> None:
    """8 servers x 64: every sample once, no more in flight than allowed, memory bounded."""
    number, in_flight = 2048, 512
    with serving(Servers(SPEED, ports=4), Servers(SPEED, ports=4)) as urls:
        with start(urls, tmp_path, max_in_flight=in_flight) as fleet:
            prompts, sampling = requests(number, 20, LONGEST, group=8)
            most = 0

            async def run() -> None:
                nonlocal most
                work = asyncio.create_task(fleet.generate(prompts, sampling))
                while not work.done():
                    most = max(most, sum(s.outstanding_tokens for s in fleet.servers))
                    await asyncio.sleep(0.01)
                check(work.result(), prompts, sampling)
                await fleet.close()

            before = psutil.Process().memory_info().rss
            asyncio.run(run())
            grown = psutil.Process().memory_info().rss - before
            assert counts(fleet) == {"server_restarts": 0}
    assert most <= in_flight * (100 + LONGEST)
    assert grown < 150e6
    assert ideal_s(sampling, in_flight, 400.0) > LONGEST / 400.0
