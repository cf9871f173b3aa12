"""Of many ranks the one that is to blame speaks, once, and in one line."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from megasapo import failures

RANK = """
import os, signal, sys, time
from megasapo import failures, launch
from megasapo.errors import UserError
for number in (signal.SIGTERM, signal.SIGUSR1):
    if number.name in sys.argv:
        flag = launch.stop_flag()
        os.kill(os.getpid(), number)
        assert flag()
if "--watched" in sys.argv:
    failures.time.sleep = lambda _: print("waits", flush=True) or signal.pause()
print("begins", flush=True)
error = UserError("no such thing") if "--user" in sys.argv else RuntimeError("gloo: Connection closed by peer")
sys.exit(failures.report("megasapo train", error))
"""


def rank(number: int, *flags: str) -> subprocess.Popen[str]:
    env = {"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path), "RANK": str(number), "WORLD_SIZE": "4"}
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, *flags], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def ended_by_the_launcher(process: subprocess.Popen[str]) -> None:
    """As torchrun does when another rank has ended: this one waits for it, and says nothing."""
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.terminate()
    assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGTERM


def test_rank_0_says_what_is_wrong_and_the_others_are_ended_before_they_repeat_it() -> None:
    first, second = rank(0, "--user"), rank(1, "--user", "--watched")
    assert first.communicate() == ("", "megasapo train: no such thing\n")
    assert first.returncode == 2
    ended_by_the_launcher(second)


def test_ranks_that_slurm_has_asked_to_stop_let_rank_0_speak_all_the_same() -> None:
    ended_by_the_launcher(rank(1, "--user", "SIGUSR1", "--watched"))


def test_a_rank_speaks_for_itself_where_nobody_ends_it() -> None:
    alone = rank(1, "--user")
    assert alone.communicate()[1] == "megasapo train: no such thing\n"
    assert alone.returncode == 2


def test_a_rank_that_lost_another_says_so_in_a_line() -> None:
    alone = rank(3, "SIGTERM")  # the launcher's SIGTERM has come: nothing to wait for
    said = alone.communicate()[1]
    assert said == "megasapo train: rank 3 lost another rank, whose message says why: gloo: Connection closed by peer\n"
    assert alone.returncode == 1


def test_an_error_that_was_there_before_another_rank_was_lost_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    lost = RuntimeError("gloo: Connection closed by peer")
    lost.__context__ = ValueError("the cause")  # as of an error in cleaning up after it
    with pytest.raises(RuntimeError, match="closed by peer"):
        failures.report("train", lost)


def test_a_process_without_others_has_lost_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="reset by peer"):
        failures.report("evaluate", RuntimeError("a tool's server: Connection reset by peer"))


def test_any_other_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        failures.report("train", RuntimeError("shapes do not fit"))
