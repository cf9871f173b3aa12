"""The fleet and the processes it owns: start, death, restart, and that nothing outlives the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megasapo.keys import Keys
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import Refused, RolloutError
from megasapo.rollout.servers import Server
from megasapo.rollout.spawn import SGLANG_WITH_KEY, ServerProcess, server_command
from megasapo.rollout.watch import Watch
from megasapo.sections import RolloutConfig
from megasapo.types import SamplingParams
from tests.asking import ask
from tests.dist.launcher import free_ports

FAKE = str(Path(__file__).with_name("fake_server.py"))
ONE = SamplingParams(max_new_tokens=1)
TIMEOUT_S = 120.0  # of what hangs


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    config = {"vocab_size": 10, "max_position_embeddings": 16, "num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def settings(*flags: str, **over: Any) -> RolloutConfig:
    defaults = {"start_timeout_s": TIMEOUT_S, "retry_for_s": TIMEOUT_S, "deterministic": False}
    return RolloutConfig(
        engine="sglang", spawn_command=(sys.executable, FAKE, "{port}"), server_args=flags, **{**defaults, **over}
    )


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, f"not in {TIMEOUT_S} s: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter while it is read
        return False


def listener(fleet: Fleet, index: int = 0) -> int:
    """The process that serves: the only child of the guard."""
    process = fleet.servers[index].process
    assert process is not None
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def generate(fleet: Fleet) -> int:
    return ask(fleet, [(1,)], ONE)[0].version_min


def test_servers_start_answer_and_stop(model: Path, tmp_path: Path) -> None:
    with Fleet.start(settings(spawn=2), model, tmp_path / "run") as fleet:
        assert generate(fleet) == -1
        assert len(set(fleet.urls)) == 2
        pids = [listener(fleet, i) for i in range(2)]
        assert all(alive(p) for p in pids)
    wait_until(lambda: not any(alive(p) for p in pids), "servers ended")
    assert "fake server on port" in (tmp_path / "run/logs/server_1.log").read_text()
    fleet.stop()  # twice is once


def test_a_crash_at_start_shows_the_log(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"(?s)ended with code 1.*server_0\.log.*scripted crash"):
        Fleet.start(settings("--crash"), model, tmp_path)


def test_a_server_that_never_gets_healthy_stops_the_start(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"(?s)rollout\.start_timeout_s=1.*fake_server.py"):
        Fleet.start(settings("--never-healthy", start_timeout_s=1.0), model, tmp_path)


def test_a_missing_command_stops_the_start(model: Path, tmp_path: Path) -> None:
    cfg = RolloutConfig(engine="sglang", spawn_command=("/nonexistent/server", "{port}"), start_timeout_s=TIMEOUT_S)
    with pytest.raises(RolloutError, match=r"(?s)ended with code 1.*/nonexistent/server"):
        Fleet.start(cfg, model, tmp_path)


def test_a_killed_server_comes_back_at_its_url_and_requests_wait_for_it(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    restart = Watch._restart

    async def once_it_is_missed(self: Watch, server: Server, why: str) -> None:
        while not fleet._dispatch._counts:
            await asyncio.sleep(0.01)
        await restart(self, server, why)

    monkeypatch.setattr(Watch, "_restart", once_it_is_missed)
    with Fleet.start(settings(), model, tmp_path) as fleet:
        urls, old = fleet.urls, listener(fleet)
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: not alive(old), "killed")
        assert generate(fleet) == -1
        assert "rollout server 0 was killed by signal 9: restart 1" in caplog.text
        assert "rollout server 0 is ready again" in caplog.text
        assert fleet.urls == urls
        assert listener(fleet) != old
        metrics = {name: m.value() for name, m in fleet.take_metrics().items()}
        assert metrics["rollout/server_restarts"] == 1
        assert metrics["rollout/retries"] >= 1


def test_restarts_have_an_end(model: Path, tmp_path: Path) -> None:
    with Fleet.start(settings(max_restarts=1), model, tmp_path) as fleet:
        server = fleet.servers[0]
        for restarts in range(2):
            wait_until(lambda: server.up, "up")
            os.kill(listener(fleet), signal.SIGKILL)
            wait_until(lambda restarts=restarts: server.restarts > restarts, "noticed")  # type: ignore[misc]
        wait_until(lambda: fleet._watch is not None and fleet._watch.failure is not None, "given up")
        with pytest.raises(RolloutError, match=r"rollout\.max_restarts=1 times"):
            generate(fleet)
        assert not fleet.stale()


def test_a_server_that_was_healthy_for_long_has_its_restarts_again(model: Path, tmp_path: Path) -> None:
    with Fleet.start(settings(max_restarts=1), model, tmp_path) as fleet:
        server = fleet.servers[0]
        for number in (1, 2, 3):
            server.started_at -= 3600  # as it was an hour ago
            os.kill(listener(fleet), signal.SIGKILL)
            wait_until(lambda number=number: server.restarts == number and server.up, f"up again ({number})")
        server.started_at = server.seen_at - 3000
        os.kill(listener(fleet), signal.SIGKILL)
        wait_until(lambda: fleet._watch is not None and fleet._watch.failure is not None, "given up")
        assert server.restarts == 4


def test_nothing_outlives_an_owner_that_is_killed(model: Path, tmp_path: Path) -> None:
    """kill -9 of the learner: the server, and a child of the server that watches nobody, must end."""
    script = f"""
import sys, time
from megasapo.sections import RolloutConfig
from megasapo.rollout.fleet import Fleet
cfg = RolloutConfig(engine="sglang", spawn_command=({sys.executable!r}, {FAKE!r}, "{{port}}"),
                    server_args=("--child", {str(tmp_path / "child")!r}), start_timeout_s={TIMEOUT_S})
fleet = Fleet.start(cfg, {str(model)!r}, {str(tmp_path)!r})
print(fleet.servers[0].process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        guard = int(owner.stdout.readline())
        served = int(Path(f"/proc/{guard}/task/{guard}/children").read_text().split()[0])
        grandchild = int((tmp_path / "child").read_text())
        pids = [guard, served, grandchild]
        assert all(alive(p) for p in pids)
        owner.kill()
        wait_until(lambda: not any(alive(p) for p in pids), "all ended")


def test_a_server_does_not_outlive_its_guard(model: Path, tmp_path: Path) -> None:
    with Fleet.start(settings(), model, tmp_path) as fleet:
        served, process = listener(fleet), fleet.servers[0].process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not alive(served), "ended")
        wait_until(lambda: fleet.servers[0].ready, "started again")
        assert generate(fleet) == -1


MAPS = """
import mmap, os, sys, time
own = sys.argv[1]
first = own.replace("sem.mp-", "sem.")  # a semaphore gets its name when it is there
with open(first, "w+b") as file:
    file.truncate(100)
    memory = mmap.mmap(file.fileno(), 100)
if first != own:
    os.link(first, own)
    os.unlink(first)
print("it is mapped", flush=True)
time.sleep(600)
"""
LEFT = pytest.mark.parametrize("name", ["sglang_loads_{}.shm", "sem.mp-{}"])


def test_the_end_of_a_log_has_nothing_of_the_server_before(tmp_path: Path) -> None:
    for word in ("first", "second"):
        command = [sys.executable, "-c", f"print('the {word}')"]
        process = ServerProcess(command, tmp_path / "log", exits_with_stdin=False)
        wait_until(lambda ended=process: ended.end() is not None, "its end")
        header, *said = process.log_tail().splitlines()
        assert header.startswith("--- ")
        assert said == [f"the {word}"]
    assert (tmp_path / "log").read_text().count("the first\n") == 1


@LEFT
def test_what_sglang_leaves_in_memory_goes_with_its_server_and_no_other(name: str, tmp_path: Path) -> None:
    own, others = (Path("/dev/shm") / name.format(f"{os.getpid()}_{whose}") for whose in ("own", "others"))
    others.write_bytes(bytes(100))
    try:
        process = ServerProcess([sys.executable, "-c", MAPS, str(own)], tmp_path / "log", exits_with_stdin=False)
        wait_until(lambda: "\nit is mapped" in process.log_tail(), "mapped")
        assert own.exists()
        process.stop()
        assert not own.exists()
        assert others.exists()
    finally:
        own.unlink(missing_ok=True)
        others.unlink()


@LEFT
def test_what_sglang_leaves_in_memory_goes_when_all_of_it_has_crashed(name: str) -> None:
    watched = """
import sys
from megasapo.rollout import spawn
look = spawn._mapped
def told(group):
    found = look(group)
    print(*("seen" for _ in found), flush=True)
    return found
spawn._mapped = told
sys.exit(spawn.guard(sys.argv[1:]))
"""
    own = Path("/dev/shm") / name.format(f"{os.getpid()}_own")
    command = [sys.executable, "-c", watched, sys.executable, "-c", MAPS, str(own)]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guard:
            assert guard.stdout is not None
            while guard.stdout.readline() != "seen\n":
                assert guard.poll() is None
            os.kill(int(Path(f"/proc/{guard.pid}/task/{guard.pid}/children").read_text()), signal.SIGKILL)
            guard.wait(TIMEOUT_S)
        assert not own.exists()
    finally:
        own.unlink(missing_ok=True)


def test_a_remote_fleet_is_connected_not_spawned(model: Path, tmp_path: Path) -> None:
    with Fleet.start(settings(), model, tmp_path) as owner:
        remote = Fleet.start(RolloutConfig(servers=owner.urls, start_timeout_s=TIMEOUT_S), model, tmp_path / "other")
        with remote:
            assert generate(remote) == -1
            assert remote.servers[0].process is None
        assert alive(listener(owner))
        with Fleet.connect(owner.cfg, owner.urls, model, leader_index=1) as leader:
            assert generate(leader) == -1
            with pytest.raises(RolloutError, match="only connected"):
                leader.begin_publish()


def test_a_remote_server_that_is_not_there_stops_the_start_and_says_why_at_once(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = RolloutConfig(servers=("http://127.0.0.1:9", "http://127.0.0.1:9/other"), start_timeout_s=0.5)
    why = r"http://127\.0\.0\.1:9/health_generate: ClientConnectorError: Cannot connect"
    with pytest.raises(RolloutError, match=rf"http://127\.0\.0\.1:9: not healthy in .*: {why}.*") as error:
        Fleet.start(cfg, model, tmp_path)
    assert "left it paused" not in str(error.value)
    [said] = [line for line in caplog.messages if "is not there yet" in line]  # of both
    assert re.match(f"rollout server 0 is not there yet; waits for up to rollout.start_timeout_s=0.5: {why}", said)


def test_a_remote_server_that_is_not_healthy_may_have_been_left_paused(model: Path, tmp_path: Path) -> None:
    [port] = free_ports(1)

    def listens() -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    with subprocess.Popen([sys.executable, FAKE, str(port), "--never-healthy"]) as process:
        try:
            wait_until(listens, "listens")
            cfg = RolloutConfig(servers=(f"http://127.0.0.1:{port}",), start_timeout_s=1.0)
            with pytest.raises(RolloutError, match=r"health_generate: 503: .*answers /model_info: .* left it paused"):
                Fleet.start(cfg, model, tmp_path)
        finally:
            process.kill()


@pytest.mark.parametrize("owned", [True, False])
def test_what_says_that_a_server_hangs_names_the_settings_that_judge_it(
    owned: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megasapo.rollout.watch.LOOK_EVERY_S", 0.1)
    monkeypatch.setattr("megasapo.rollout.watch.HEALTH_EVERY_S", 0.0)
    stuck = tmp_path / "stuck"
    with Fleet.start(settings("--stuck-by", str(stuck)), model, tmp_path) as owner:
        remote = RolloutConfig(servers=owner.urls, health_timeout_s=25.0, start_timeout_s=TIMEOUT_S)
        with contextlib.nullcontext(owner) if owned else Fleet.start(remote, model, tmp_path / "other") as fleet:
            assert fleet._watch is not None
            if owned:  # only now that it has started, for which there is time
                fleet._watch._cfg = fleet.cfg.model_copy(update={"start_timeout_s": 0.5})
            stuck.touch()
            wait_until(lambda: fleet.servers[0].hung, "found out")
            if owned:
                wait_until(lambda: fleet.servers[0].restarts > 0, "ended")
            stuck.unlink()
    said = [line for line in caplog.messages if line.startswith("rollout server 0 generates nothing")]
    [ours] = [line for line in said if f"raise rollout.health_timeout_s={30 if owned else 25}" in line]
    assert ("where it is started, SGLANG_HEALTH_CHECK_TIMEOUT" in ours) != owned
    if owned:
        assert any("above rollout.start_timeout_s=0.5: it is ended" in line for line in caplog.messages)


def test_a_refused_question_stops_the_start(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: object) -> dict[str, Any]:
        raise Refused("401: Unauthorized", 401)

    monkeypatch.setattr("megasapo.rollout.client.ServerClient.model_info", refuse)
    with pytest.raises(Refused, match="401"):
        Fleet.start(settings(), model, tmp_path)


def test_a_remote_server_that_comes_back_with_another_key_is_used_when_that_is_mended(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(self: object) -> dict[str, Any]:
        raise Refused("401: Unauthorized", 401)

    with Fleet.start(settings(), model, tmp_path) as owner:
        cfg = RolloutConfig(servers=owner.urls, deterministic=False, start_timeout_s=TIMEOUT_S)
        with Fleet.start(cfg, model, tmp_path / "other") as remote:
            [server] = remote.servers
            monkeypatch.setattr("megasapo.rollout.client.ServerClient.model_info", refuse)
            wait_until(lambda: not server.up, "found out")
            assert (server.state, server.trouble) == ("dead", "401: Unauthorized")
            monkeypatch.undo()
            wait_until(lambda: server.ready, "used again")
            assert generate(remote) == -1
            remote.check()
    said = [line for line in caplog.messages if line.startswith("rollout server 0 refuses this run")]
    assert 1 <= len(said) <= 2  # of each fleet, once


def test_the_command_line_of_each_engine() -> None:
    embedded = RolloutConfig(api_key_file="key", server_args=("--threads", "1"))
    assert server_command(embedded, "m", 5) == [
        *(sys.executable, "-m", "megasapo.rollout.local", "--model", "m", "--port", "5"),
        *("--deterministic", "--api-key-file", "key", "--health-timeout-s", "30", "--threads", "1"),
    ]
    assert "--deterministic" not in server_command(RolloutConfig(max_staleness=1, api_key_file="key"), "m", 5)
    sglang = RolloutConfig(engine="sglang", api_key_file="key", server_args=("--tp", "2"), health_timeout_s=61.5)
    assert server_command(sglang, "m", 5, host="0.0.0.0", python="py") == [
        *("env", "SGLANG_HEALTH_CHECK_TIMEOUT=62", "py", str(SGLANG_WITH_KEY), "key", "--model-path", "m"),
        *("--host", "0.0.0.0", "--port", "5", "--tp", "2"),
    ]
    own = ("run.sh", "{model}", "--at={port}", "{host}", "{api_key_file}")
    own_command = RolloutConfig(engine="sglang", api_key_file="key", spawn_command=own)
    limited = ["env", "SGLANG_HEALTH_CHECK_TIMEOUT=30"]
    assert server_command(own_command, "m", 5, host="h") == [*limited, "run.sh", "m", "--at=5", "h", "key"]


def test_a_server_is_ready_last_when_the_rest_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads wait for `ready`, and read then what it says of its trouble."""
    server, seen = Server(0, "http://127.0.0.1:9", up=True, trouble="it was away"), []
    monkeypatch.setattr(Watch, "_say", lambda *_: seen.append((server.ready, server.trouble)))
    watch = Watch(settings(), [server], tmp_path, tmp_path, Keys(), lambda _: None)
    try:
        watch._judge(server)
        assert server.ready
    finally:
        watch.stop()
    assert seen == [(False, "")]


def test_each_fleet_makes_a_key_and_its_servers_see_no_other(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEGASAPO_API_KEY", "of-others")
    monkeypatch.setenv("MEGASAPO_ADMIN_API_KEY", "of-their-admin")
    made = []
    for _ in range(2):
        with Fleet.start(settings(), model, tmp_path) as fleet:
            assert fleet.cfg.api_key_file == str(tmp_path / "api_key")
            made.append((tmp_path / "api_key").read_text())
            environment = Path(f"/proc/{listener(fleet)}/environ").read_bytes()
            assert generate(fleet) == -1
        assert b"of-others" not in environment
        assert b"of-their-admin" not in environment
    assert len({*made, "of-others"}) == 3
    assert "has no {api_key_file}: whoever is on this machine can use its servers" in caplog.text


def test_servers_do_not_inherit_a_rank(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with Fleet.start(settings(), model, tmp_path) as fleet:
        environment = Path(f"/proc/{listener(fleet)}/environ").read_bytes().split(b"\0")
    names = {entry.split(b"=")[0] for entry in environment}
    assert not names & {b"RANK", b"MASTER_PORT", b"TORCHELASTIC_RUN_ID"}
    assert b"PATH" in names
