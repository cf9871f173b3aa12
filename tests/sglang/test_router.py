"""A real sglang-router in front of two embedded servers that ask for a key (rollout.router)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import Refused
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams
from tests.sglang.calls import publish
from tests.sglang.conftest import Contract, client, with_brake
from tests.sglang.reference import logprobs_of
from tests.sglang.router import routing
from tests.tiny import make_model

pytestmark = pytest.mark.sglang
PROMPTS = [(5, 6, 7, i) for i in range(10, 18) for _ in range(4)]  # groups of four
LONG = SamplingParams(max_new_tokens=1000, ignore_eos=True)


@dataclass(frozen=True)
class Behind:
    """Servers that somebody else started, and the run that reaches them through a router."""

    owner: Fleet
    run: Contract


@pytest.fixture
def behind(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Behind]:
    # dense: of tens of thousands of tokens a few would lie between two experts, and go to the other in the reference
    old, new = (make_model(tmp_path / name, "dense", seed=seed) for name, seed in (("old", 1), ("new", 2)))
    settings: dict[str, Any] = {"deterministic": False, "start_timeout_s": 400.0, "request_timeout_s": 400.0}
    options = getattr(request, "param", ())
    servers = RolloutConfig(spawn=2, max_restarts=0, server_args=("--threads", "1"), **settings)
    with with_brake(tmp_path / "run" / "brake"), Fleet.start(servers, old, tmp_path / "servers") as owner:
        key = tmp_path / "servers" / "api_key"
        with routing(owner.urls, key.read_text(), tmp_path / "router.log", options) as url:
            cfg = RolloutConfig(servers=owner.urls, router=url, api_key_file=str(key), **settings)
            with Fleet.start(cfg, old, tmp_path / "run") as fleet, client(url) as http:
                yield Behind(owner, Contract("embedded", fleet, http, old, new, tmp_path / "run"))


def sample(fleet: Fleet, sampling: SamplingParams, disturb: Callable[[], bool] | None = None) -> list[Completion]:
    """`disturb` is called until it says that it did."""

    async def run() -> list[Completion]:
        try:
            work = asyncio.create_task(fleet.generate(PROMPTS, [sampling] * len(PROMPTS)))
            while disturb is not None and not disturb():
                await asyncio.sleep(0.05)
                assert not work.done()
            return await work
        finally:
            await fleet.close()

    return asyncio.run(run())


def assert_sampled_from(model: Path, completions: list[Completion], version: int) -> None:
    assert len(completions) == len(PROMPTS)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = logprobs_of(model, prompt, completion.output_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)
        assert (completion.version_min, completion.version_max) == (version, version)


def running(owner: Fleet) -> list[int]:
    """Requests that each server works on."""
    infos = [owner.run(owner.control(s).server_info()) for s in owner.servers]
    return [info["internal_states"][0]["num_running_reqs"] for info in infos]


def test_groups_come_through_with_the_weights_that_each_server_was_given(behind: Behind) -> None:
    run, short = behind.run, SamplingParams(max_new_tokens=12, ignore_eos=True)
    completions = sample(run.fleet, short)
    assert len({c.output_ids for c in completions}) > len(PROMPTS) // 2  # sampled, and none is another's
    assert_sampled_from(run.old, completions, -1)
    publish(run, run.new, 3, "disk")
    assert {s.version for s in run.fleet.servers} == {3}
    assert_sampled_from(run.new, sample(run.fleet, short), 3)
    assert set(run.fleet.take_metrics()) == {"rollout/server_restarts"}  # nothing was asked for twice


def test_a_killed_worker_loses_no_sample(behind: Behind) -> None:
    run, process = behind.run, behind.owner.servers[0].process
    assert process is not None
    publish(run, run.new, 1, "disk")

    def kill() -> bool:
        if min(running(behind.owner)) == 0:
            return False
        os.kill(process.pid, signal.SIGKILL)
        run.brake.unlink()
        return True

    run.brake.touch()
    completions = sample(run.fleet, LONG, kill)
    assert {len(c.output_ids) for c in completions} == {LONG.max_new_tokens}
    assert_sampled_from(run.new, completions, 1)


GIVES_UP = ("--request-timeout-secs=10", "--health-check-interval-secs=2", "--health-failure-threshold=3")


@pytest.mark.parametrize("behind", [GIVES_UP], indirect=True)
def test_a_worker_that_hangs_loses_no_sample_and_nothing_waits_for_our_own_timeout(behind: Behind) -> None:
    run, process = behind.run, behind.owner.servers[0].process
    assert process is not None
    publish(run, run.new, 1, "disk")
    os.kill(process.pid, signal.SIGSTOP)
    assert_sampled_from(run.new, sample(run.fleet, SamplingParams(max_new_tokens=12, ignore_eos=True)), 1)
    assert "rollout/retries" not in run.fleet.take_metrics()  # the router repeats what it had sent there


def test_the_key_is_asked_for_through_the_router(behind: Behind, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another-key")
    cfg = behind.run.fleet.cfg.model_copy(update={"api_key_file": str(tmp_path / "other")})
    with Fleet.connect(cfg, behind.owner.urls, behind.run.old) as stranger, pytest.raises(Refused, match="401"):
        sample(stranger, LONG)
