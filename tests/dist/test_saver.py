"""A rank that is lost, or too slow, while a checkpoint is written: the others say so, and blame no disk."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megasapo import checkpoints
from megasapo.checkpoints import CheckpointError
from megasapo.sections import TrainConfig
from tests.dist.launcher import run_ranks

SAID = "the others say:"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dies", "rank 0 lost another rank, which has ended, and says why itself"),
        ("hangs", "rank 0 waited train.save_timeout_s=20 for the others"),
    ],
)
def test_a_rank_that_is_lost_in_a_save_is_no_trouble_of_the_disk(how: str, said: str, tmp_path: Path) -> None:
    output = run_ranks(2, "tests.dist.test_saver", str(tmp_path / "run"), how, logs=tmp_path / "logs")[0]
    line = output.partition(SAID)[2]
    assert "step_00000002 could not be written" in line
    assert said in line
    assert "`latest` names the one before" in line
    assert "free space" not in line
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000001"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


def main(run: Path, how: str) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    from megasapo.mcore.saver import Saver

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    topo: Any = SimpleNamespace(rank=rank, world_size=2, device=torch.device("cpu"))
    saver = Saver(TrainConfig(save_timeout_s=20.0 if how == "hangs" else 60.0), topo)

    def save(step: int) -> None:
        part = ShardedTensor.from_rank_offsets("weight", torch.full((4,), float(step)), (0, rank, 2))
        saver.save(run, step, {"weight": part}, {"format": checkpoints.FORMAT}, aside="")
        saver.finish()

    save(1)

    def lost(_: object) -> list[str]:
        while how == "hangs" and not (run / "over").exists():
            time.sleep(0.05)
        os._exit(0)

    if rank == 1:  # its files are written, not hashed
        checkpoints.sha256 = lost  # type: ignore[assignment]
    try:
        save(2)
    except CheckpointError as e:
        print(SAID, e, flush=True)
        (run / "over").touch()
        os._exit(0)  # the group is broken: nothing to take leave of


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
