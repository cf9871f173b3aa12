"""`megasapo watch` on directories made by hand, on a real terminal, and the signs of life that it reads."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from megasapo import watch
from megasapo.errors import UserError
from megasapo.launch import Place
from megasapo.log import heartbeat
from megasapo.log.heartbeat import Heartbeat, write_json
from tests.dist.launcher import free_ports

NOW = 1_700_000_000.0
TIMEOUT_S = 120  # of what hangs


def rank(number: int, **over: Any) -> dict[str, Any]:
    record = {
        **{"rank": number, "world": 4, "host": f"n{number // 2}", "pid": 100 + number, "job": "7", "attempt": 1},
        **{"started": NOW - 100, "state": "running", "error": "", "step": 12, "total": 40, "phase": "update"},
        **{"since": NOW - 3, "written": NOW - 2},
    }
    return record | over


def row(step: int, **over: float | None) -> dict[str, Any]:
    figures = {"time/rollout_s": 1.0, "time/update_s": 2.0, "time/step_s": 4.0, "reward/mean": step / 100}
    return {"step": step, **figures, **over}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 4 ranks on 2 machines in the middle of step 12 of 40."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    (run / "checkpoints" / "latest").write_text("step_00000010\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, 12)))
    put(run, *(rank(n) for n in range(4)))
    return run


def put(run: Path, *records: dict[str, Any]) -> None:
    for record in records:
        write_json(run / "logs" / "ranks" / f"rank_{record['rank']}.json", record)


def shown(run: Path, width: int = 100) -> str:
    return "\n".join(text for text, _ in watch.frame(watch.read(run, NOW), width))


def word(run: Path) -> tuple[str, bool]:
    found = watch.condition(watch.read(run, NOW))
    return found.word, found.well


# --- what is said ---


def test_running(run_dir: Path) -> None:
    assert word(run_dir) == ("running", True)
    text = shown(run_dir)
    assert "rank 0 on n0, job 7, attempt 1; last checkpoint: step_00000010" in text
    assert "step 11/40 [########----------------------] 28%   4 s a step (mean of 11)   ETA 1:56 min" in text
    assert re.search(r"rollout +1\.000 s +25%  #{15}$", text, re.M)
    assert re.search(r"update +2\.000 s +50%  #{30}$", text, re.M)
    assert re.search(r"the rest +1\.000 s +25%", text)
    assert re.search(r"reward/mean +0\.1100  ▁▂▂▃▄▄▅▆▇▇█$", text, re.M)
    assert "ranks: 4 of 4 alive" in text
    assert re.search(r"n0 +2 of 2 alive  2 in update for 3 s", text)


def test_a_line_is_never_wider_than_the_terminal(run_dir: Path) -> None:
    put(run_dir, rank(3, state="failed", error="RuntimeError: " + "x" * 300))
    for width in (20, 60, 100, 200):
        assert max(map(len, shown(run_dir, width).splitlines())) <= width


def test_metrics_that_are_null_or_torn_are_left_out(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(row(12, **{"reward/mean": None})) + "\n" + '{"step": 13, "rew')
    text = shown(run_dir)
    assert "step 12/40" in text
    assert re.search(r"reward/mean +0\.1100", text)  # the last there is


def test_a_long_file_is_read_from_its_end(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TAIL_BYTES", 250)
    assert [r["step"] for r in watch.read(run_dir, NOW).rows] == [10, 11]


def test_gpus_servers_and_warnings(run_dir: Path) -> None:
    figures = {"gpu/0/util": 90.0, "gpu/1/util": 70.0, "gpu/1/memory_gb": 61.0, "eval/pass@1": 0.5}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row(1, **figures)) + "\n")
    server = {"url": "http://n3:30000", "up": True, "ready": True, "version": 11, "restarts": 0, "trouble": ""}
    servers = [
        {"index": 0, "outstanding_tokens": 4096, **server},
        {"index": 1, "outstanding_tokens": 0, **server, "ready": False, "version": 10},
        {"index": 2, "outstanding_tokens": 0, **server, "up": False, "ready": False, "trouble": "ended\nwith code 1"},
        {"index": 3, "outstanding_tokens": 0, **server, "up": False, "ready": False, "version": None},
    ]
    write_json(
        run_dir / "logs" / "servers.json", {"written": NOW - 99, "version": 11, "max_restarts": 3, "servers": servers}
    )
    events = [{"step": s, "why": f"grad/norm = {s}", "action": "warn"} for s in range(1, 9)]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    text = shown(run_dir)
    assert re.search(r"gpu util +80\.0  70 to 90 % over 2 GPUs", text)
    assert re.search(r"eval/pass@1 +0\.5000", text)
    assert "rollout servers: 1 of 4 ready, weights wanted: version 11, as they were 1:39 min ago" in text
    assert "0 http://n3:30000  ready, version 11, restarts 0, 4096 tokens outstanding of rank 0" in text
    assert "1 http://n3:30000  other weights, version 10" in text
    assert "2 http://n3:30000  down, version 11, restarts 0: ended with code 1" in text
    assert "3 http://n3:30000  starting, version None" in text
    assert "step 3: " not in text
    assert "step 8: grad/norm = 8: warn" in text


def test_finished(run_dir: Path) -> None:
    write_json(run_dir / "done", {"command": "train", "step": 40})
    assert word(run_dir) == ("finished", True)
    assert "FINISHED: `megasapo train` reached step 40" in shown(run_dir)
    assert "ranks:" not in shown(run_dir)


def test_not_started(run_dir: Path) -> None:
    for path in (run_dir / "logs" / "ranks").iterdir():
        path.unlink()
    assert word(run_dir) == ("not started", True)
    assert "metrics.jsonl ends at step 11" in shown(run_dir)
    (run_dir / "metrics.jsonl").unlink()
    assert "no rank has given a sign of life; is the job still queued?" in shown(run_dir)


def test_starting_and_who_is_missing(run_dir: Path) -> None:
    put(run_dir, *(rank(n, step=None, phase="join") for n in range(3)))
    (run_dir / "logs" / "ranks" / "rank_3.json").unlink()
    assert word(run_dir) == ("starting", True)
    assert "STARTING: 3 of 4 ranks are there" in shown(run_dir)
    assert "not there yet in this attempt: 1: 3" in shown(run_dir)


def test_stopping_and_stopped(run_dir: Path) -> None:
    (run_dir / "stop").touch()
    assert word(run_dir) == ("stopping", True)
    put(run_dir, *(rank(n, state="ended") for n in range(4)))
    assert word(run_dir) == ("stopped", True)


def test_dead(run_dir: Path) -> None:
    put(run_dir, *(rank(n, written=NOW - 200 - n) for n in range(4)))
    assert word(run_dir) == ("dead", False)
    assert "DEAD: no rank has given a sign of life for 3:20 min" in shown(run_dir)
    assert "rank 3 on n1, process 103: silent, last seen in phase update, 3:23 min ago" in shown(run_dir)
    assert "ETA" not in shown(run_dir)


def test_incomplete(run_dir: Path) -> None:
    put(run_dir, rank(2, written=NOW - 31))
    assert word(run_dir) == ("incomplete", False)
    assert "INCOMPLETE: 1 of 4 ranks give no sign of life" in shown(run_dir)
    assert re.search(r"n1 +1 of 2 alive", shown(run_dir))


def test_failed_names_who_was_first(run_dir: Path) -> None:
    put(run_dir, rank(3, state="failed", error="OutOfMemoryError: CUDA\nout of memory", written=NOW - 9))
    put(run_dir, rank(1, state="failed", error="DistBackendError: peer gone", written=NOW - 8))
    assert word(run_dir) == ("failed", False)
    assert "FAILED: rank 3 on n1 in phase update: OutOfMemoryError: CUDA out of memory" in shown(run_dir)


def test_files_of_earlier_attempts_are_left_out(run_dir: Path) -> None:
    """A wider attempt that failed, then one of 2 ranks of which the second has not come up."""
    put(run_dir, *(rank(n, attempt=0, state="failed", error="E: x", written=NOW - 500) for n in range(4)))
    put(run_dir, rank(0, world=2, started=NOW - 10, step=None))
    assert word(run_dir) == ("starting", True)
    assert "not there yet in this attempt: 1: 1" in shown(run_dir)
    put(run_dir, rank(1, attempt=1, state="failed", error="E: x", started=NOW - 900, written=NOW - 500))
    assert word(run_dir) == ("starting", True)  # the same attempt's number, but it ended before this one began
    put(run_dir, rank(1, world=2, started=NOW - 9))
    assert "ranks: 2 of 2 alive" in shown(run_dir)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00 min"), (7380, "2:03 h"), (352800, "4 d 02 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert watch._duration(seconds) == text


def test_a_small_terminal_is_not_scrolled(run_dir: Path) -> None:
    screen = watch._screen(watch.read(run_dir, NOW), 60, 8)
    assert screen.count("\n") == 7
    assert "more lines: enlarge the terminal" in screen


# --- the command ---


def test_exit_codes_of_once(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(run_dir, *(rank(n, written=time.time()) for n in range(4)))
    assert watch.main([str(run_dir), "--once"]) == 0
    put(run_dir, rank(0, state="failed", error="E: x", written=time.time()))
    assert watch.main([str(run_dir), "--once"]) == 1
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"), [("logs/ranks/rank_1.json", ""), ("metrics.jsonl", "\0\0\n"), ("done", "3")]
)
def test_a_damaged_file_is_named(run_dir: Path, name: str, content: str) -> None:
    put(run_dir, rank(0))
    (run_dir / name).write_text(content)
    with pytest.raises(UserError, match=rf"^{run_dir / name}(:1)?: (not JSON|expected an object)"):
        watch.main([str(run_dir), "--once"])


def test_wrong_directories(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"nothing: no such directory; runs in {tmp_path}: run$"):
        watch.main([str(tmp_path / "nothing"), "--once"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no run directory: it has neither config.yaml nor"):
        watch.main([str(tmp_path / "empty"), "--once"])
    with pytest.raises(UserError, match=r"needs a terminal, and this output is none: use --once"):
        watch.main([str(run_dir)])
    with pytest.raises(UserError, match=r"tensorboard: not there: the run has not started"):
        watch.main([str(run_dir), "--tensorboard", "6006"])


@contextmanager
def live(run: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The live view in a terminal of its own, and that terminal's other end."""
    ours, theirs = pty.openpty()
    resize(ours, 40, 100)
    command = [sys.executable, "-m", "megasapo.cli", "watch", str(run), "--every", "0.1"]
    # a shell that started the tests in the background has had them ignore SIGINT
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=default)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def output_until(terminal: int, pattern: str) -> str:
    """What comes out of the terminal up to something that matches."""
    seen, deadline = "", time.monotonic() + TIMEOUT_S
    while not re.search(pattern, seen, re.S):
        assert time.monotonic() < deadline, f"no {pattern!r} in {seen[-2000:]!r}"
        if select.select([terminal], [], [], 1.0)[0]:
            seen += os.read(terminal, 65536).decode(errors="replace")
    return seen


def test_live_view_follows_the_run_and_the_terminals_size(run_dir: Path) -> None:
    put(run_dir, *(rank(n, written=time.time() + TIMEOUT_S) for n in range(4)))
    with live(run_dir) as (process, terminal):
        first = output_until(terminal, r"RUNNING.*ranks: 4 of 4 alive")
        assert first.startswith(watch.ENTER)
        resize(terminal, 5, 30)
        output_until(terminal, r"\.\.\. \d+ more lines: enlarge the?\x1b")
        put(run_dir, rank(1, state="failed", error="E: x", written=time.time()))
        output_until(terminal, r"FAILED")
        write_json(run_dir / "done", {"command": "train", "step": 40})
        output_until(terminal, re.escape(watch.LEAVE) + r".*FINISHED: `megasapo train` reached step 40")
        assert process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_live_view_puts_the_terminal_back(run_dir: Path, number: signal.Signals, code: int) -> None:
    with live(run_dir) as (process, terminal):
        output_until(terminal, "DEAD")
        process.send_signal(number)
        output_until(terminal, re.escape(watch.LEAVE))
        assert process.wait(TIMEOUT_S) == code


def test_tensorboard_is_served_from_the_run_directory(run_dir: Path) -> None:
    (run_dir / "tensorboard").mkdir()
    [port] = free_ports(1)  # which it takes seconds later
    command = [sys.executable, "-m", "megasapo.cli", "watch", str(run_dir), "--tensorboard", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            assert process.poll() is None, process.stdout.read().decode()  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/data/environment", timeout=10).json()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    assert answer["data_location"] == str(run_dir / "tensorboard")


# --- signs of life ---


def sign(run: Path, number: int = 0) -> dict[str, Any]:
    return json.loads((run / "logs" / "ranks" / f"rank_{number}.json").read_text())


def test_a_rank_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SHORTEST_S", 0.01)
    with Heartbeat(tmp_path, Place("n1", 3, 8, "7", 2)) as beat:
        beat.at(5, 40)
        with beat.phase("update"):
            deadline = time.monotonic() + TIMEOUT_S
            while not (tmp_path / "logs/ranks/rank_3.json").exists() or sign(tmp_path, 3)["phase"] != "update":
                assert time.monotonic() < deadline
                time.sleep(0.005)
        during = sign(tmp_path, 3)
    known = {"rank": 3, "world": 8, "host": "n1", "job": "7", "attempt": 2, "pid": os.getpid(), "step": 5, "total": 40}
    assert during.items() >= {**known, "state": "running", "error": ""}.items()
    assert sign(tmp_path, 3).items() >= {**known, "state": "ended", "phase": "other"}.items()
    assert [p.name for p in (tmp_path / "logs/ranks").iterdir()] == ["rank_3.json"]


def test_a_failed_rank_says_where_and_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Heartbeat(tmp_path, Place("n1", 0, 1, "", 0)) as beat, beat.phase("publish"):
        raise RuntimeError("no server")
    assert sign(tmp_path).items() >= {"state": "failed", "phase": "publish", "error": "RuntimeError: no server"}.items()


def test_short_phases_are_not_all_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(heartbeat, "write_json", lambda path, record: written.append(record["phase"]))
    began = time.monotonic()
    with Heartbeat(tmp_path, Place("n1", 0, 1, "", 0)) as beat:
        while not written:  # the thread has begun
            time.sleep(0.001)
        for _ in range(1000):
            with beat.phase("update"):
                pass
    assert 2 <= len(written) <= 2 + (time.monotonic() - began) / heartbeat.SHORTEST_S + 1


def test_a_file_system_that_refuses_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logs").write_text("a file where a directory should be")
    with Heartbeat(tmp_path, Place("n1", 0, 1, "", 0)):
        pass
    assert [r.getMessage()[:15] for r in caplog.records] == ["no sign of life"]


def test_every_log_line_says_node_attempt_and_rank(tmp_path: Path) -> None:
    script = (
        "import logging; from pathlib import Path; from megasapo import run\n"
        "run.on_ranks('train', [], 1, []); logging.getLogger('megasapo.x').warning('hello')"
    )
    env = {**os.environ, "SLURM_RESTART_COUNT": "2", "RANK": "3", "WORLD_SIZE": "8"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, env=env)
    expected = rf"[\d-]+ [\d:,]+ {re.escape(socket.gethostname())} attempt 2 rank 3 WARNING megasapo\.x: hello\n"
    assert re.fullmatch(expected, done.stderr)
