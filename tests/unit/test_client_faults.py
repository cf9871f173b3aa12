"""The client and the fleet's retries against a server that fails in every way a script can make it."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from megasapo.keys import Keys
from megasapo.rollout import client as client_module
from megasapo.rollout import dispatch as dispatch_module
from megasapo.rollout.client import ServerClient, retrying
from megasapo.rollout.dispatch import Dispatch
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.limits import ModelLimits
from megasapo.rollout.loop import LoopThread
from megasapo.rollout.protocol import BadAnswer, Refused, Retryable, RolloutError
from megasapo.rollout.servers import Server
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams
from tests.asking import ask
from tests.unit.standin_server import Standin, serving

LIMITS = ModelLimits(100, max_positions=64, num_layers=2, num_experts=4, topk=2, model_type="", dense_layers=())
PROMPTS = [(1, 2), (3,)]
THREE = SamplingParams(max_new_tokens=3)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.02)


def fleet_of(*urls: str, version: int | None = 7, leader_index: int = 0, **settings: Any) -> Fleet:
    defaults = {"deterministic": False, "request_timeout_s": 120.0, "retry_for_s": 120.0}
    fleet = Fleet(RolloutConfig(servers=urls, **{**defaults, **settings}), urls, LIMITS, leader_index)
    for server in fleet.servers:
        server.ready = True
    fleet.version = version
    return fleet


def generate(fleet: Fleet, prompts: list[tuple[int, ...]] = PROMPTS) -> list[Completion]:
    return ask(fleet, prompts, THREE)


def once(url: str, **settings: Any) -> list[Completion]:
    async def run() -> list[Completion]:
        client = ServerClient(url, **settings)
        try:
            return await client.generate(PROMPTS, [THREE, THREE])
        finally:
            await client.close()

    return asyncio.run(run())


def test_completions_come_back_in_the_order_of_the_prompts() -> None:
    with serving(Standin(["ok"])) as server:
        first, second = generate(fleet_of(server.url))
    assert first.output_ids == (3, 4, 5)
    assert second.output_ids == (3, 4, 5)
    assert first.logprobs.tolist() == [-0.5, -0.75, -1.0]
    assert (first.finish_reason, first.version_min, first.version_max) == ("length", 7, 7)


def test_the_request_says_every_sampling_parameter_and_the_key() -> None:
    sampling = SamplingParams(max_new_tokens=3, temperature=0.7, stop_token_ids=(9,), sampling_seed=11)
    with serving(Standin(["ok"])) as server:

        async def run() -> None:
            client = ServerClient(server.url, Keys("secret"))
            await client.generate([(1, 2)], [sampling])
            await client.close()

        asyncio.run(run())
    assert server.bodies == [
        {
            "input_ids": [[1, 2]],
            "sampling_params": {  # sglang-router refuses a list
                "max_new_tokens": 3,
                "temperature": 0.7,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "stop_token_ids": [9],
                "ignore_eos": False,
                "sampling_seed": 11,
            },
            "return_logprob": True,
            "return_text_in_logprobs": False,
        }
    ]
    assert server.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (500, "unreachable"),
        (503, "unreachable"),
        (429, "unreachable"),
        (408, "unreachable"),
        ("cut", "unreachable"),
        ("truncated", "bad_answer"),
        ("nan", "bad_answer"),
        ("null", "bad_answer"),
        ("short", "bad_answer"),
        ("abort", "bad_answer"),
        ({"weight_version": "6"}, "wrong_version"),
        ({"weight_version": "default"}, "wrong_version"),
        (
            {"weight_versions": [{"version": "6", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": 3}]},
            "wrong_version",
        ),
        ({"output_token_logprobs": None}, "bad_answer"),
    ],
)
def test_a_fault_is_retried_and_counted(fault: Any, counted: str) -> None:
    with serving(Standin([fault, fault, "ok"])) as server:
        fleet = fleet_of(server.url)
        (completion,) = generate(fleet, [(1, 2)])
    assert completion.output_ids == (3, 4, 5)
    assert len(server.times) == 3
    metrics = {name: metric.value() for name, metric in fleet.take_metrics().items()}
    assert metrics == {"rollout/retries": 2, f"rollout/{counted}": 2}
    assert fleet.take_metrics() == {}


def test_many_failures_of_a_server_are_one_line_and_a_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [(i,) for i in range(1, 41)]
    monkeypatch.setattr(dispatch_module, "SAY_EVERY_S", 600.0)
    with serving(Standin([500] * 80 + ["ok"])) as server:
        fleet = fleet_of(server.url)
        generate(fleet, prompts)
        assert [r.getMessage() for r in caplog.records] == [
            f"a request is repeated: {server.url}/generate: 500: scripted 500"
        ]
        fleet.servers[0].ready = False
        fleet._dispatch._cfg = fleet.cfg.model_copy(update={"retry_for_s": 0.2})
        with pytest.raises(RolloutError, match="no rollout server is ready now"):
            generate(fleet, prompts)
        assert len(caplog.records) == 2
        fleet.servers[0].ready = True
        server.script = [500, "ok"]
        monkeypatch.setattr(dispatch_module, "SAY_EVERY_S", 0.0)
        generate(fleet, [(1,)])
    assert re.search(r": scripted 500 \(and 79 more since \d+ s\)$", caplog.records[2].getMessage())


def test_waits_grow_between_attempts() -> None:
    with serving(Standin([500] * 5 + ["ok"])) as server:
        generate(fleet_of(server.url), [(1, 2)])
    waits = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(waits) == 5
    # each wait lies in [1/2, 1] of 0.02, 0.04 ... 0.32 s: at least its half, whatever the machine's load adds
    for i, wait_s in enumerate(waits):
        assert wait_s >= 0.01 * 2**i


def test_the_ceiling_ends_the_retries_with_the_servers_message() -> None:
    with serving(Standin([500])) as server:
        with pytest.raises(RolloutError, match=r"ceiling 0\.3 s.*scripted 500"):
            generate(fleet_of(server.url, retry_for_s=0.3))
    assert len(server.times) >= 3


def test_the_ceiling_counts_from_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may run long and time out; it still has its retries."""
    passed_s = 0.0

    class Long(Standin):
        async def _act(self, action: Any, body: dict[str, Any], send: Any) -> None:
            nonlocal passed_s
            passed_s += 1000.0 if action == 500 else 0.0
            await super()._act(action, body, send)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed_s)
    monkeypatch.setattr(client_module, "time", clock)
    with serving(Long([500, "ok"])) as server:
        (completion,) = generate(fleet_of(server.url), [(1, 2)])
    assert completion.output_ids == (3, 4, 5)


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_other_4xx_is_not_retried(status: int) -> None:
    with serving(Standin([status])) as server:
        with pytest.raises(Refused, match=f"{status}: scripted {status}"):
            generate(fleet_of(server.url))
    assert len(server.times) <= 2  # one for each prompt


def test_nobody_listening_is_retryable() -> None:
    with socket.socket() as taken:  # so that nobody else can listen
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Retryable, match="ClientConnectorError"):
            once(f"http://127.0.0.1:{taken.getsockname()[1]}")


def test_a_timeout_is_retryable_and_says_how_long() -> None:
    with serving(Standin(["slow"])) as server:
        with pytest.raises(Retryable, match=r"no answer in rollout\.request_timeout_s=0\.2$"):
            once(server.url, request_timeout_s=0.2)


def test_too_few_answers_are_a_bad_answer() -> None:
    class Short(Standin):
        async def _act(self, action: Any, body: dict[str, Any], send: Any) -> None:
            await super()._act(
                action, {**body, "input_ids": body["input_ids"][:1], "sampling_params": [{"max_new_tokens": 3}]}, send
            )

    with serving(Short(["ok"])) as server:
        with pytest.raises(BadAnswer, match="asked for 2 completions, the server sent 1 answers"):
            once(server.url)


def test_a_request_moves_to_another_server_when_its_own_fails() -> None:
    with serving(Standin([500])) as bad, serving(Standin(["ok"])) as good:
        completions = generate(fleet_of(bad.url, good.url), [(i,) for i in range(1, 9)])
    assert [c.output_ids[0] for c in completions] == list(range(1, 9))


def test_requests_go_to_the_server_with_the_fewest_tokens_outstanding() -> None:
    with serving(Standin(["ok"])) as a, serving(Standin(["ok"])) as b:
        generate(fleet_of(a.url, b.url), [(i,) for i in range(1, 9)])
    assert (len(a.times), len(b.times)) == (4, 4)


def test_a_deterministic_fleet_sends_one_request_to_the_leaders_server() -> None:
    with serving(Standin(["ok"])) as a, serving(Standin(["ok"])) as b:
        fleet = fleet_of(a.url, b.url, deterministic=True, leader_index=1)
        generate(fleet)
    assert (len(a.times), len(b.times)) == (0, 1)
    assert b.bodies[0]["input_ids"] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("stamp", "accepted"), [("6", False), ("7", True), ("8", True), ("9", False), ("default", False)]
)
def test_staleness_bounds_the_versions(stamp: str, accepted: bool) -> None:
    with serving(Standin(["ok"], version=stamp)) as server:
        fleet = fleet_of(server.url, max_staleness=2, retry_for_s=0.2)
        if accepted:
            assert generate(fleet, [(1,)])[0].version_min == int(stamp)
        else:
            with pytest.raises(RolloutError, match=r"allowed are 7\.\."):
                generate(fleet, [(1,)])


def test_an_unstamped_server_is_refused_in_the_first_steps_too() -> None:
    """Version 0 with a staleness of 1 must not accept -1, which stands for "no version"."""
    with serving(Standin(["ok"], version="default")) as server:
        with pytest.raises(RolloutError, match=r"versions -1\.\.-1, allowed are 0"):
            generate(fleet_of(server.url, version=0, max_staleness=1, retry_for_s=0.2), [(1,)])


def test_before_the_first_publish_any_version_will_do() -> None:
    with serving(Standin(["ok"], version="default")) as server:
        assert generate(fleet_of(server.url, version=None), [(1,)])[0].version_max == -1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [((1, 100), "token ids 1..100, the vocabulary has 100"), ((-1,), "token ids -1"), ((), "prompt 0 is empty"),
     ((1,) * 62, "62 tokens")],
)  # fmt: skip
def test_impossible_prompts_never_leave(prompt: tuple[int, ...], message: str) -> None:
    fleet = fleet_of("http://127.0.0.1:1")
    with pytest.raises(ValueError, match=message):
        generate(fleet, [prompt])


def test_a_failure_cancels_the_other_requests() -> None:
    class OneRefused(Standin):
        async def _act(self, action: Any, body: dict[str, Any], send: Any) -> None:
            await super()._act(400 if body["input_ids"] == [[3]] else "slow", body, send)

    with serving(OneRefused(["ok"])) as server:
        with pytest.raises(Refused):
            generate(fleet_of(server.url))


def test_a_server_may_be_lost_while_connections_are_closed() -> None:
    """The watch says so from its own thread, which may be anywhere in it when the rollouts end."""

    class Interrupted(Dispatch):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "_loop" and threading.current_thread() is threading.main_thread() and value is not None:
                loop.run(self.close())
            return value

    cfg = RolloutConfig(servers=("http://127.0.0.1:1",), deterministic=False)
    servers, loop = [Server(0, cfg.servers[0])], LoopThread()
    dispatch = Interrupted(cfg, servers, LIMITS, Keys(), 0, newest=lambda: None, check=lambda: None)
    loop.run(dispatch.generate([], [], routed=False))
    dispatch.lost(servers[0])
    loop.close()


def test_no_more_requests_in_flight_than_allowed() -> None:
    class Counting(Standin):
        now = most = 0

        async def _act(self, action: Any, body: dict[str, Any], send: Any) -> None:
            self.now += 1
            self.most = max(self.most, self.now)
            while self.most < 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.02)
            self.now -= 1
            await super()._act(action, body, send)

    with serving(Counting(["ok"])) as server:
        generate(fleet_of(server.url, max_in_flight=3), [(i,) for i in range(1, 13)])
    assert server.most == 3


def test_the_limit_of_open_files_admits_all_connections_or_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 20_000)]
    monkeypatch.setattr("resource.getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda kind, new: limits.append(new))
    fleet_of("http://127.0.0.1:1", max_in_flight=512)
    fleet_of("http://127.0.0.1:1", max_in_flight=16384)
    assert limits == [(1024, 20_000), (16384 + 512, 20_000)]
    with pytest.raises(RolloutError, match=r"max_in_flight=30000 needs .* 20000 files: lower it to at most 19488, or"):
        fleet_of("http://127.0.0.1:1", max_in_flight=30_000)


def test_jitter_leaves_seeded_randomness_alone() -> None:
    outcomes = [Retryable("a"), Retryable("b"), None]

    async def attempt() -> str:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return "done"

    random.seed(5)
    before = random.getstate()
    assert asyncio.run(retrying(attempt, what="it", for_s=120)) == "done"
    assert random.getstate() == before


def test_a_url_without_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="does not start with http://"):
        ServerClient("localhost:30000")
