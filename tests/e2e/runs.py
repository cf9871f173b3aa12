"""Real runs of the command line for end-to-end tests: start, watch, kill, compare."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

TIMEOUT_S = 900  # of what hangs
FAULTS = (
    "rollout/retries",
    "rollout/unreachable",
    "rollout/server_restarts",
    "rollout/bad_answer",
    "rollout/wrong_version",
)
TIMING = ("time/", "perf/", "gpu/", *FAULTS)


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


class Run:
    """One `megasapo COMMAND` in its own process group; its output is in `log`."""

    def __init__(self, command: str, config: Path, *overrides: str, log: Path):
        self._log = log
        self._out = log.open("ab")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megasapo.cli", command, str(config), *overrides],
            stdout=self._out,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            # a shell that started the tests in the background has had them ignore SIGINT
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def wait(self) -> int:
        """The exit code; a run that takes too long fails the test with the end of its output."""
        try:
            return self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {TIMEOUT_S} s:\n{self.output()[-3000:]}") from None

    def succeed(self) -> str:
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.output()[-5000:]}"
        return self.output()

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self._process.poll() is None, f"ended before {what}:\n{self.output()[-5000:]}"
            assert time.monotonic() < deadline, f"waited {TIMEOUT_S} s for {what}:\n{self.output()[-3000:]}"
            time.sleep(0.05)

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it."""
        os.killpg(self._process.pid, signal.SIGINT)

    def processes(self, is_wanted: Callable[[psutil.Process], bool] = lambda p: True) -> list[psutil.Process]:
        """Those of the run; one that ends while it is looked at is left out."""
        found = []
        for p in [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]:
            try:
                if is_wanted(p):
                    found.append(p)
            except psutil.NoSuchProcess:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        return self.processes(
            lambda p: "megasapo" in " ".join(p.cmdline()) and "RANK" in p.environ() and not self._is_server(p)
        )

    def servers(self) -> list[psutil.Process]:
        return self.processes(self._is_server)

    @staticmethod
    def _is_server(p: psutil.Process) -> bool:
        return "megasapo.rollout.local" in p.cmdline()

    def close(self) -> None:
        """Nothing of the run may outlive the test."""
        for p in self.processes() if self._process.poll() is None else []:
            with suppress(psutil.NoSuchProcess):
                p.kill()
        self._process.wait(TIMEOUT_S)
        self._out.close()


@contextmanager
def running(command: str, config: Path, *overrides: str, log: Path) -> Iterator[Run]:
    run = Run(command, config, *overrides, log=log)
    try:
        yield run
    finally:
        run.close()


def run_and_break(
    config: Path, break_it: Callable[[Run], None], *changes: str, run_dir: Path, log: Path, before: int
) -> tuple[Run, int]:
    """A training run to which something was done between its third step and step `before`; it, and its exit code.

    A test that gets no turn on a busy machine may come too late: then the run is made again.
    """
    for _ in range(5):
        shutil.rmtree(run_dir, ignore_errors=True)
        with running("train", config, *changes, log=log) as run:
            run.until(lambda: steps_done(run_dir) >= 3, "the third step")
            if steps_done(run_dir) < before:
                break_it(run)
                if steps_done(run_dir) < before:
                    return run, run.wait()
    raise AssertionError("the run is always over too soon")


def kill_hard(processes: list[psutil.Process]) -> None:
    assert processes, "nothing to kill"
    for p in processes:
        with suppress(psutil.NoSuchProcess):  # it ended with one before it
            p.kill()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def without_timing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in rows]
