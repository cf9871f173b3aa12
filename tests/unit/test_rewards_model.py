"""Rewards: what each grader answers, weights, and that a grader that raises, hangs or dies costs a zero and no more."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from megasapo import keys
from megasapo.config import ConfigError
from megasapo.rewards import pool
from megasapo.rewards.inline import exact_match, format_match
from megasapo.rewards.model import RewardModel, Scored
from megasapo.rewards.pool import RewardError
from megasapo.sections import RewardConfig, RewardSpec
from megasapo.types import Prompt

GRADERS = "tests.unit.graders_for_tests"


def prompt(answer: str = "42", **fields: Any) -> Prompt:
    return Prompt(index=7, input_ids=(1,), text="q", answer=answer, fields=fields)


def spec(name: str, weight: float = 1.0, **options: Any) -> RewardSpec:
    return RewardSpec(name=name, weight=weight, options=options)


def score(
    specs: list[RewardSpec], responses: list[str], to: Prompt | None = None, max_workers: int = 2, **settings: Any
) -> tuple[list[Scored], float]:
    """The scored responses and reward/grader_errors."""

    async def run() -> tuple[list[Scored], float]:
        cfg = RewardConfig(rewards=tuple(specs), **settings)
        async with RewardModel(cfg, max_workers=max_workers) as model:
            scored = await model.score_group(to or prompt(), responses)
            return scored, model.take_metrics()["reward/grader_errors"].value()  # type: ignore[union-attr]

    return asyncio.run(asyncio.wait_for(run(), timeout=300))


def rewards(specs: list[RewardSpec], responses: list[str], to: Prompt | None = None, **settings: Any) -> list[float]:
    scored, num_errors = score(specs, responses, to, **settings)
    assert num_errors == 0
    return [s.reward for s in scored]


def test_graders_do_not_get_the_keys_of_rollout_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (keys.VARIABLE, keys.ADMIN_VARIABLE):
        monkeypatch.setenv(name, "secret")
    assert rewards([spec(f"{GRADERS}:num_keys")], ["a"]) == [0.0]


@pytest.mark.parametrize(
    ("answer", "response", "options", "reward"),
    [
        ("42", " 42\n", {}, 1),
        ("42", "it is 42", {}, 0),
        ("Yes", "yes", {}, 0),
        ("Yes", "yes", {"ignore_case": True}, 1),
        ("42", "7 + 35 = 42", {"pattern": r"-?\d+"}, 1),  # the last match counts
        ("42", "42 or 43", {"pattern": r"-?\d+"}, 0),
        ("42", "#### 42 .", {"pattern": r"#### *(-?\d+)"}, 1),
        ("42", "no number", {"pattern": r"\d+"}, 0),
        ("", "nothing", {"pattern": r"\d+"}, 0),  # no match is not an empty answer
    ],
)
def test_exact_match(answer: str, response: str, options: dict[str, Any], reward: float) -> None:
    assert asyncio.run(exact_match(prompt(answer), response, **options)) == reward


@pytest.mark.parametrize(
    ("response", "options", "reward"),
    [
        ("<think>a\nb</think>c", {"pattern": "<think>.*</think>.+"}, 1),
        ("so <think>a</think>c", {"pattern": "<think>.*</think>.+"}, 0),
        ("so <think>a</think>c", {"pattern": "<think>.*</think>.+", "full": False}, 1),
    ],
)
def test_format(response: str, options: dict[str, Any], reward: float) -> None:
    assert asyncio.run(format_match(prompt(), response, **options)) == reward


MATH = [  # answer in the data, response, reward
    ("26", "15 20 26", 1),
    ("26", "26 15", 0),
    ("12", "The answer is 12.", 1),
    ("\\frac{1}{2}", "0.5", 1),
    ("1/2", "so $\\boxed{\\frac{2}{4}}$", 1),
    ("x^2+1", "$1+x^2$", 1),
    ("1,000", "1000", 1),
    ("-7", "-7", 1),
    ("-7", "7", 0),
    ("3", "", 0),
    ("(1,2)", "$(1,2)$", 1),
    ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", 1),
    ("3", "\\boxed{4} and not 3", 0),
]


def test_math() -> None:
    async def run() -> list[float]:
        async with RewardModel(RewardConfig(timeout_s=60.0), max_workers=1) as model:
            return [(await model.score(prompt(answer), response)).reward for answer, response, _ in MATH]

    assert asyncio.run(run()) == [reward for *_, reward in MATH]


def test_unreadable_gold_answer_is_a_failure() -> None:
    (scored,), num_errors = score([spec("math")], ["3"], prompt(answer=""), timeout_s=60.0)
    assert (scored.reward, num_errors) == (0, 1)
    assert "cannot read the answer '' of prompt 7" in scored.errors[0]


def test_weighted_sum_and_parts() -> None:
    specs = [spec("exact_match", 2.0), spec("format", 0.5, pattern=r"\d+"), spec("format", -1.0, pattern=r"4.*")]
    scored, _ = score(specs, ["42", "43", "x"])
    assert [s.reward for s in scored] == [1.5, -0.5, 0.0]
    assert scored[1].parts == {"exact_match": 0.0, "format": 1.0, "format#2": 1.0}


def test_function_in_a_worker_with_options_and_fields() -> None:
    assert rewards([spec(f"{GRADERS}:length", scale=0.5)], ["", "abcd"]) == [0.0, 2.0]
    assert rewards([spec(f"{GRADERS}:field")], ["x"], prompt(points=3)) == [3.0]
    assert os.getpid() not in rewards([spec(f"{GRADERS}:pid")], ["x"])


@pytest.mark.parametrize("bad", ["raise", "exit", "die", "nan", "inf", "text", "none"])
def test_failing_grader_scores_zero_and_is_counted(bad: str) -> None:
    scored, num_errors = score([spec(f"{GRADERS}:misbehave"), spec("exact_match")], ["42", bad, "42"], max_workers=1)
    assert [s.reward for s in scored] == [2.0, 0.0, 2.0]
    assert num_errors == 1
    assert f"failed on prompt 7 and response {bad!r}" in scored[1].errors[0]


def test_hanging_graders_cost_their_timeout_and_leave_no_process() -> None:
    responses = ["ok", "spin", "sleep", "ok", "spin", "ok"]
    scored, num_errors = score([spec(f"{GRADERS}:misbehave")], responses, max_workers=3, timeout_s=8.0)
    assert [s.reward for s in scored] == [float(r == "ok") for r in responses]
    assert num_errors == 3
    assert "took longer than reward.timeout_s=8.0" in scored[1].errors[0]
    assert worker_pids(os.getpid()) == []


def test_async_grader_runs_calls_together_and_its_hangs_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    scored, num_errors = score([spec(f"{GRADERS}:judge")], ["x", "wait", "y"], timeout_s=8.0)
    assert ([s.reward for s in scored], num_errors) == ([0.5, 0.0, 0.5], 1)
    monkeypatch.setattr(pool, "ASYNC_GRACE_S", 2.0)
    scored, num_errors = score([spec(f"{GRADERS}:judge")], ["block"], timeout_s=1.0)
    assert ([s.reward for s in scored], num_errors) == ([0.0], 1)


def test_an_async_grader_that_gets_no_turn_for_seconds_still_answers() -> None:
    """Its calls are timed from when it reads them."""
    scored, num_errors = score([spec(f"{GRADERS}:judge")], ["late", "now"], timeout_s=1.0)
    assert ([s.reward for s in scored], num_errors) == ([0.0, 0.5], 1)


def test_error_policy_stops_the_run() -> None:
    with pytest.raises(RewardError, match=r"failed on prompt 7 and response 'raise': .*: no mood.*on_error"):
        score([spec(f"{GRADERS}:misbehave")], ["raise"], on_error="error")


def test_a_run_that_stops_while_a_worker_starts_closes_its_pipes() -> None:
    gc.collect()
    with warnings.catch_warnings(record=True) as left_open:
        warnings.simplefilter("always", ResourceWarning)
        with pytest.raises(RewardError, match="no mood"):
            score([spec(f"{GRADERS}:misbehave")], ["raise", "ok"], on_error="error")
        gc.collect()
    assert not left_open
    assert worker_pids(os.getpid()) == []


def test_only_failures_stop_the_run() -> None:
    specs = [spec(f"{GRADERS}:misbehave")]
    with pytest.raises(RewardError, match="it was failure 3 in a row"):
        score(specs, ["raise"] * 4, max_workers=1, max_errors_in_a_row=3)
    _, num_errors = score(specs, ["raise", "raise", "ok"] * 2, max_workers=1, max_errors_in_a_row=3)
    assert num_errors == 4


def test_a_dead_grader_stops_the_run_beside_one_that_works() -> None:
    specs = [spec("format", pattern=".*"), spec(f"{GRADERS}:misbehave")]
    with pytest.raises(RewardError, match=r"reward .*misbehave failed .* failure 3 in a row"):
        score(specs, ["raise"] * 6, max_workers=1, max_errors_in_a_row=3)


def test_endless_backtracking_is_a_failure() -> None:
    (scored,), num_errors = score([spec("format", pattern="(a|aa)+")], ["a" * 60 + "b"])
    assert (scored.reward, num_errors) == (0.0, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (spec("exactmatch"), "unknown reward 'exactmatch'; did you mean 'exact_match'"),
        (spec("judge"), "unknown reward 'judge'; use exact_match, format, http, math or package.module:function"),
        (spec("exact_match", patern="x"), "unknown option 'patern'; did you mean 'pattern'"),
        (spec("format"), "needs the option 'pattern'"),
        (spec("http", url="http://x", client=1), "unknown option 'client'"),
        (spec("format", pattern="("), "missing"),
        (spec("no.such.module:f"), "there is no module 'no.such.module': it is looked for where python finds modules"),
        (spec("nosuchmodule:f"), "there is no module 'nosuchmodule'"),
    ],
)
def test_wrong_settings_are_refused(bad: RewardSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardModel(RewardConfig(rewards=(bad,)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (spec(f"{GRADERS}:absent"), "cannot be loaded: AttributeError"),
        (spec(f"{GRADERS}:not_a_function"), "is not a function but int"),
        (spec(f"{GRADERS}:length", scal=2), "unknown option 'scal'; did you mean 'scale'"),
        (spec(f"{GRADERS}:of_another_library"), r"called as f\(prompt, response\), and takes \(\*, completions"),
        (spec(f"{GRADERS}:with_an_answer"), "needs the option 'answer'; what a problem has is in prompt.answer"),
    ],
)
def test_graders_that_cannot_be_loaded_stop_the_start(bad: RewardSpec, message: str) -> None:
    with pytest.raises(RewardError, match=message) as stopped:
        score([bad], ["x"])
    assert str(stopped.value).count("reward ") == 1
    assert "options.py" not in str(stopped.value)


def test_a_grader_may_take_whatever_it_is_given() -> None:
    assert rewards([spec(f"{GRADERS}:wrapped")], ["abc"]) == [3]


@pytest.mark.skipif(sys.platform != "linux", reason="a hung grader is tied to its parent by a Linux call")
def test_workers_do_not_outlive_a_killed_run(tmp_path: Path) -> None:
    """A learner killed with SIGKILL leaves neither an idle nor a spinning grader behind."""
    program = (
        "import asyncio\n"
        "from tests.unit.test_rewards_model import GRADERS, RewardConfig, RewardModel, prompt, spec\n"
        "async def main():\n"
        f"    cfg = RewardConfig(rewards=(spec('{GRADERS}:misbehave'),), timeout_s=600.0)\n"
        "    async with RewardModel(cfg, max_workers=2) as model:\n"
        "        spin = asyncio.create_task(model.score(prompt(), 'spin'))\n"
        "        await asyncio.sleep(0.1)\n"
        "        await model.score(prompt(), 'ok')\n"
        "        print('ready', flush=True)\n"
        "        await spin\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as run:
        try:
            assert run.stdout is not None
            assert run.stdout.readline() == b"ready\n"
            workers = worker_pids(run.pid)
        finally:
            run.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    wait_until_gone(workers)


def worker_pids(parent: int) -> list[int]:
    import psutil

    return [p.pid for p in psutil.Process(parent).children() if "megasapo.rewards.worker" in p.cmdline()]


def wait_until_gone(pids: list[int]) -> None:
    import psutil

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + 120
    while left := [p for p in pids if alive(p)]:
        assert time.monotonic() < deadline, f"still alive: {left}"
        time.sleep(0.1)


class JudgeServer(BaseHTTPRequestHandler):
    """Answers by what the response says; `fail_first` of the requests get 503."""

    requests: ClassVar[list[bytes]] = []
    fail_first: ClassVar[int] = 0
    over: ClassVar[threading.Event]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        type(self).requests.append(body)
        if b"hang" in body:
            type(self).over.wait(120)
        status, answer = 200, b'{"reward": 0.25}'
        if len(self.requests) <= self.fail_first:
            status, answer = 503, b"busy"
        elif b"teapot" in body:
            status, answer = 418, b"short and stout"
        elif b"garbage" in body:
            answer = b'{"score": 1}'
        self.send_response(status)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Requests are not worth a line each."""


@pytest.fixture
def judge_url() -> Iterator[str]:
    JudgeServer.requests, JudgeServer.fail_first, JudgeServer.over = [], 0, threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), JudgeServer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    JudgeServer.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_http_sends_everything_and_retries_5xx(judge_url: str) -> None:
    import json

    JudgeServer.fail_first = 2
    assert rewards([spec("http", url=judge_url)], ["r"], prompt(points=3)) == [0.25]
    assert len(JudgeServer.requests) == 3
    assert json.loads(JudgeServer.requests[-1]) == {
        "prompt": "q",
        "response": "r",
        "answer": "42",
        "fields": {"points": 3},
    }


@pytest.mark.parametrize(
    ("response", "fail_first", "timeout_s", "problem", "num_requests"),
    [
        ("r", 99, 120, "status 503, after 2 attempts", 2),
        ("teapot", 0, 120, "status 418: short and stout", 1),
        ("garbage", 0, 120, 'expected {"reward": number}', 1),
        ("hang", 0, 8, "took longer than reward.timeout_s=8.0", 1),
    ],
)
def test_http_failures_are_scored_by_policy(
    judge_url: str, response: str, fail_first: int, timeout_s: float, problem: str, num_requests: int
) -> None:
    JudgeServer.fail_first = fail_first
    (scored,), num_errors = score([spec("http", url=judge_url, retries=1)], [response], timeout_s=timeout_s)
    assert (scored.reward, num_errors, len(JudgeServer.requests)) == (0.0, 1, num_requests)
    assert problem in scored.errors[0]


def test_http_server_that_is_not_there(judge_url: str) -> None:
    (scored,), num_errors = score([spec("http", url="http://127.0.0.1:9/", retries=0)], ["r"])
    assert (scored.reward, num_errors) == (0.0, 1)
    assert "ConnectError" in scored.errors[0]
