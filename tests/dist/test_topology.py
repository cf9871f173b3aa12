"""Groups and coordinates of real process groups.

pytest starts this file again as four ranks (`python -m tests.dist.test_topology`); ranks assert.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.dist.launcher import ROOT, free_ports, run_ranks


def test_four_ranks(tmp_path: Path) -> None:
    ports = ",".join(map(str, free_ports(2)))
    outputs = run_ranks(4, "tests.dist.test_topology", ports, logs=tmp_path)
    assert all("all held" in text for text in outputs)


def test_without_launcher_it_is_a_world_of_one() -> None:
    code = """
from megasapo.config import ConfigError
from megasapo.sections import ParallelConfig
from megasapo.mcore.topology import Topology
topo = Topology.init(ParallelConfig())
assert (topo.world_size, topo.rank, topo.dp, topo.is_leader, topo.is_first_stage, topo.is_last_stage) == (
    1, 0, 1, True, True, True)
assert topo.gather("x") == ["x"] and topo.any(True) and not topo.any(False)
topo.destroy()
try:
    Topology.init(ParallelConfig(tp=2))
except ConfigError as e:
    print("refused:", e)
"""
    bare = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "refused: parallel: tp(2)*pp(1)*cp(1)=2 does not divide world size 1" in done.stdout


def _rank_main() -> None:
    first, second = sys.argv[1].split(",")
    os.environ["MASTER_PORT"] = first
    _check_tp2_pp2()
    os.environ["MASTER_PORT"] = second
    _check_tp2_dp2_ep4()
    print("all held", flush=True)


def _check_tp2_pp2() -> None:
    import torch.distributed as dist

    from megasapo.sections import ParallelConfig
    from megasapo.mcore.topology import Topology

    topo = Topology.init(ParallelConfig(tp=2, pp=2))
    assert (topo.tp_rank, topo.pp_rank, topo.dp_rank) == (topo.rank % 2, topo.rank // 2, 0)
    assert topo.is_leader == (topo.rank == 0)
    assert (topo.is_first_stage, topo.is_last_stage) == (topo.rank < 2, topo.rank >= 2)
    assert dist.get_process_group_ranks(topo.replica_group) == [0, 1, 2, 3]
    assert dist.get_process_group_ranks(topo.tp_group) == [topo.rank - topo.rank % 2, topo.rank - topo.rank % 2 + 1]
    assert dist.get_process_group_ranks(topo.pp_group) == [topo.rank % 2, topo.rank % 2 + 2]
    assert topo.gather(topo.rank) == [0, 1, 2, 3]
    assert [topo.any(topo.rank == 2), topo.any(False)] == [True, False]
    assert torch.get_num_threads() == 1
    topo.destroy()


def _check_tp2_dp2_ep4() -> None:
    import torch.distributed as dist

    from megasapo.sections import ParallelConfig
    from megasapo.mcore.topology import Topology, parallel_state

    topo = Topology.init(ParallelConfig(tp=2, ep=4))
    assert (topo.dp, topo.tp_rank, topo.dp_rank) == (2, topo.rank % 2, topo.rank // 2)
    assert topo.is_leader == (topo.tp_rank == 0)
    assert dist.get_process_group_ranks(topo.replica_group) == [2 * topo.dp_rank, 2 * topo.dp_rank + 1]
    assert dist.get_process_group_ranks(topo.dp_group) == [topo.tp_rank, topo.tp_rank + 2]
    assert dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group()) == [0, 1, 2, 3]
    if topo.is_leader:
        assert topo.leaders_group is not None
        assert dist.get_process_group_ranks(topo.leaders_group) == [0, 2]
        assert dist.get_rank(topo.leaders_group) == topo.dp_rank
    else:
        assert topo.leaders_group is None
    topo.destroy()


if __name__ == "__main__":
    _rank_main()
