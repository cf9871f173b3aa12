"""The crash matrix: kill -9 while checkpoints are written, a full disk, damage, two jobs. The run always goes on.

Every case ends with the metrics of the run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.disks import fill, small_disk
from tests.dist.launcher import start_alone
from tests.dist.small_run import Task, read_rows
from tests.tiny import make_model

KILLS, SEED = 20, 7
WAIT_S = 600  # of what hangs
EVERY = {"save_every": 1, "keep_checkpoints": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("crashes") / "model", kind="moe", num_hidden_layers=1)


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, float]]]:
    """The metrics of a run that is left alone and saves only at its end."""
    where = tmp_path_factory.mktemp("unbroken")

    def rows(steps: int) -> list[dict[str, float]]:
        found = read_rows(where / "rows.jsonl")
        if len(found) < steps:  # goes on from its last step, as a run does that is given more of them
            assert finish(Run(model, where, steps, {"save_every": steps})) == 0
            found = read_rows(where / "rows.jsonl")
        return found[:steps]

    return rows


class Run:
    """A small run of one rank, started in a process of its own."""

    def __init__(self, model: Path, where: Path, until: int, train: dict[str, Any] | None = None, **more: Any) -> None:
        self.run, self.rows = Path(more.pop("run", where / "run")), where / "rows.jsonl"
        self._began, self._output = self.rows.with_suffix(".began"), where / "log"
        self._began.unlink(missing_ok=True)
        task = Task(str(model), str(self.run), str(self.rows), until, EVERY if train is None else train, **more)
        self.process = start_alone("tests.dist.small_run", task.arguments(), output=self._output)

    def began(self) -> int:
        """The step that it continues from, once it has loaded it."""
        deadline = time.monotonic() + WAIT_S
        while not (self._began.exists() and self._began.read_text()):
            assert self.process.is_alive() and time.monotonic() < deadline, self.output()
            time.sleep(0.01)
        return int(self._began.read_text())

    def go_on(self, steps: float) -> None:
        """Wait for so many more steps, whatever a step takes here; of the last one for that part of it."""
        started, deadline, before = time.monotonic(), time.monotonic() + WAIT_S, self._num_rows()
        while self._num_rows() - before < int(steps):
            assert self.process.is_alive() and time.monotonic() < deadline, self.output()
            time.sleep(0.01)
        step_s = (time.monotonic() - started) / int(steps) if steps >= 1 else 0.1
        time.sleep(step_s * (steps % 1))

    def _num_rows(self) -> int:
        return self.rows.read_bytes().count(b"\n") if self.rows.exists() else 0

    def output(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""


@contextmanager
def going(run: Run) -> Iterator[Run]:
    """Nothing of a run outlives the test."""
    try:
        yield run
    finally:
        run.process.kill()
        run.process.join()


def finish(run: Run) -> int:
    with going(run):
        run.process.join(WAIT_S)
        code = run.process.exitcode
    assert code is not None, f"not done after {WAIT_S} s: {run.output()}"
    return int(code)


def latest(run_dir: Path) -> str:
    return (run_dir / "checkpoints" / "latest").read_text()


@pytest.mark.slow
def test_kill_at_any_moment_of_saving(model: Path, tmp_path: Path, unbroken: Any) -> None:
    """Steps follow one another without a pause between their checkpoints, so one is nearly always being written."""
    moments, half_written, reached = random.Random(SEED), 0, 0
    for _ in range(KILLS):
        with going(Run(model, tmp_path, 10_000)) as run:
            assert run.began() >= reached  # never behind what it continued from before
            reached = run.began()
            run.go_on(moments.uniform(0, 6))
            run.process.kill()
            run.process.join()
        half_written += bool(list((tmp_path / "run" / "checkpoints").glob("*.tmp")))
    assert half_written >= 3
    assert reached >= 3, "nothing was ever saved"
    last = len(read_rows(tmp_path / "rows.jsonl")) + 2
    run = Run(model, tmp_path, last)
    assert finish(run) == 0, run.output()
    assert "damaged" not in run.output()
    assert read_rows(tmp_path / "rows.jsonl") == unbroken(last)
    assert latest(tmp_path / "run") == f"step_{last:08d}"
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", *(f"step_{step:08d}" for step in range(last - 2, last + 1))]


def test_full_disk(model: Path, tmp_path: Path, unbroken: Any) -> None:
    with small_disk(tmp_path / "disk") as disk:
        where = {"run": str(disk / "run")}
        assert finish(Run(model, tmp_path, 2, **where)) == 0
        ballast = fill(disk, free=2**17)  # less than a checkpoint
        assert_survives_a_failed_save(model, tmp_path, unbroken, os.strerror(errno.ENOSPC), ballast.unlink, **where)


def test_file_too_large(model: Path, tmp_path: Path, unbroken: Any) -> None:
    """The same without root: the kernel refuses to write more than so much into one file, as a quota would."""
    assert finish(Run(model, tmp_path, 2)) == 0
    assert_survives_a_failed_save(
        model, tmp_path, unbroken, os.strerror(errno.EFBIG), lambda: None, largest_file=2**17
    )


def assert_survives_a_failed_save(
    model: Path, where: Path, unbroken: Any, cause: str, mend: Callable[[], None], largest_file: int = 0, **more: str
) -> None:
    broken = Run(model, where, 50, largest_file=largest_file, **more)
    assert finish(broken) == 2, broken.output()
    assert f"checkpoint {broken.run / 'checkpoints' / 'step_00000003'} could not be written: rank 0" in broken.output()
    assert cause in broken.output()
    assert "Traceback" not in broken.output()
    assert latest(broken.run) == "step_00000002"
    assert not list((broken.run / "checkpoints").glob("*.tmp"))
    mend()
    assert finish(Run(model, where, 4, **more)) == 0
    assert read_rows(where / "rows.jsonl") == unbroken(4)


def flip_a_bit(checkpoint: Path) -> str:
    path = checkpoint / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "__0_0.distcp has another SHA-256"


def remove_a_file(checkpoint: Path) -> str:
    (checkpoint / ".metadata").unlink()
    return ".metadata is missing"


@pytest.mark.parametrize("damage", [flip_a_bit, remove_a_file])
def test_damage(damage: Callable[[Path], str], model: Path, tmp_path: Path, unbroken: Any) -> None:
    assert finish(Run(model, tmp_path, 2)) == 0
    folder = tmp_path / "run" / "checkpoints"
    problem = damage(folder / "step_00000002")
    run = Run(model, tmp_path, 4)
    assert finish(run) == 0
    assert problem in run.output()
    assert f"it is now step_00000002.damaged: continuing from {folder / 'step_00000001'}" in run.output()
    assert (folder / "step_00000002.damaged").is_dir()
    assert read_rows(tmp_path / "rows.jsonl") == unbroken(4)


def test_two_jobs_on_one_run_directory(model: Path, tmp_path: Path) -> None:
    with going(Run(model, tmp_path, 10_000)) as first:
        first.began()
        other = tmp_path / "other"
        other.mkdir()
        second = Run(model, other, 1, run=first.run)
        assert finish(second) == 2
        assert f"{first.run} is in use by process {first.process.pid} on" in second.output()
        assert not second.rows.exists()
        assert first.process.is_alive()
        first.process.kill()
        first.process.join()
    with going(Run(model, tmp_path, 10_000)) as again:  # a killed process holds nothing
        again.began()
