"""Who is a rank: torchrun's variables, srun's, neither."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from megasapo import launch
from megasapo.config import ConfigError
from megasapo.launch import LAUNCHER
from megasapo.mcore.topology import Topology
from megasapo.run import on_ranks, world_size
from megasapo.sections import ParallelConfig

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*VARIABLES, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "set so that monkeypatch restores it")
        monkeypatch.delenv(name)


def test_a_plain_process_is_no_rank() -> None:
    assert not launch.is_rank()


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.is_rank()


def srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)


def test_srun_joins_with_the_address_that_the_batch_script_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    srun(monkeypatch)
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launch.is_rank()
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == ("9", "1", "16")


def test_srun_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    srun(monkeypatch)
    with pytest.raises(ConfigError, match="export MASTER_ADDR and MASTER_PORT"):
        launch.is_rank()


@pytest.mark.parametrize(
    ("sizes", "asked", "ranks"),
    [({}, None, 1), ({"ep": 2}, None, 2), ({"tp": 2, "pp": 2, "ep": 2}, None, 4), ({"tp": 2, "pp": 2, "ep": 2}, 8, 8)],
)
def test_as_few_ranks_as_the_layout_needs(sizes: dict[str, int], asked: int | None, ranks: int) -> None:
    assert world_size(ParallelConfig(**sizes), asked) == ranks


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="--nproc 0: give at least one rank"):
        world_size(ParallelConfig(tp=2), 0)


def test_under_torchrun_its_number_of_ranks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size(ParallelConfig(tp=2), None) == 6


@pytest.mark.parametrize(
    ("layouts", "ranks", "said"),
    [
        ([{"etp": 16}], 16, "16 ranks (parallel.etp=16)"),
        ([{"tp": 2, "pp": 8, "vpp": 2}], 16, "16 ranks (parallel.tp=2, parallel.pp=8)"),
        ([{}, {"tp": 16}], 16, "16 ranks (parallel.tp=16)"),
        ([{"tp": 2}], 32, "32 ranks (--nproc 32)"),
    ],
)
def test_more_ranks_than_cores_or_gpus_are_named_with_the_setting_before_they_start(
    layouts: list[dict[str, int]],
    ranks: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start() -> int | None:
        return on_ranks("score", [], ranks, [ParallelConfig(**sizes) for sizes in layouts])

    started = []
    monkeypatch.setattr(launch, "run", lambda *args: started.append(args) or 0)
    monkeypatch.setattr(launch, "cores", lambda: 15)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert start() == 0
    told = f"{said} will take turns on the 15 cores here, which is slow, and each needs memory of its own"
    assert capsys.readouterr().err == f"megasapo score: {told}\n"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 15)
    with pytest.raises(ConfigError, match=f"^{re.escape(said)} need a GPU each, and there are 15 here: ask for fewer"):
        start()
    assert len(started) == 1
    monkeypatch.setattr(launch, "cores", lambda: ranks)
    for gpus in (0, ranks):
        monkeypatch.setattr("torch.cuda.device_count", lambda n=gpus: n)
        assert start() == 0
    assert capsys.readouterr().err == ""


def test_a_rank_without_a_gpu_beside_ranks_that_have_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="rank 2 of this machine has no GPU: there are 2"):
        Topology.init(ParallelConfig())


def test_a_rank_whose_launcher_died_before_it_began_ends() -> None:
    gone = 2**22 + 1  # beyond the highest process id of Linux
    code = "from megasapo.launch import die_with_parent; die_with_parent(); print('went on')"
    ranks = {
        pid: subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {LAUNCHER: str(pid)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        for pid in (os.getpid(), gone)
    }
    assert ranks[os.getpid()].stdout == "went on\n"
    assert ranks[gone].returncode == 1
    assert f"process {gone}, is gone" in ranks[gone].stderr


def test_a_frozen_heap_is_thawed_at_the_end() -> None:
    """Libraries that count what they gave out (nanobind) would complain about all of it otherwise."""
    script = (
        "import atexit, gc\n"
        "atexit.register(lambda: print('at the end', gc.get_freeze_count()))\n"
        "from megasapo import launch\n"
        "launch.freeze_heap()\n"
        "print('frozen', gc.get_freeze_count() > 1000)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["frozen True", "at the end 0"]
