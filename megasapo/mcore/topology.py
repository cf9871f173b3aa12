"""Which rank does what: process groups and coordinates, made once at start and passed explicitly.

`Topology.init` is the only place that reads torchrun's environment, and this is the only file that reads
megatron-core's parallel_state. It knows nothing of models or data. Ranks are laid out tp fastest, then cp, dp, pp.
Experts are spread over the tp x cp x dp ranks of a stage by their own degrees: etp fastest, then ep.
"""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megasapo.config import ConfigError
from megasapo.data.packing import Shard
from megasapo.layout import check_layout, fewest_ranks
from megasapo.sections import ParallelConfig

# A rank may wait for a whole rollout of its peers inside a collective.
TIMEOUT = datetime.timedelta(hours=2)
META = torch.device("meta")


@dataclass(frozen=True)
class Topology:
    rank: int
    world_size: int
    tp: int
    pp: int
    ep: int
    cp: int
    etp: int
    vpp: int  # model chunks a pipeline stage
    dp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    is_first_stage: bool
    is_last_stage: bool
    is_leader: bool  # talks to the rollout servers for its replica: rank 0 of tp, cp and pp
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    tokens_group: dist.ProcessGroup  # the tp x cp ranks of a stage that share the sequences of a micro-batch
    replica_group: dist.ProcessGroup  # gloo; the tp x cp x pp ranks that share a dp_rank, the leader is its rank 0
    leaders_group: dist.ProcessGroup | None  # gloo; the leaders in dp order, None on other ranks
    world_group_cpu: dist.ProcessGroup  # gloo; all ranks, apart from megatron-core's traffic
    rows: int = 1  # a rank's tokens come in multiples of this

    @staticmethod
    def init(parallel: ParallelConfig, *, seed: int = 1, rows: int = 1) -> Topology:
        """Join the process group that RANK, WORLD_SIZE and MASTER_* describe (one process without them), unless joined.

        `seed` feeds megatron-core's random number tracker; `rows`: PrecisionConfig.rows. Raises ConfigError on an
        impossible layout, before any group is made.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        check_layout(parallel, world_size)
        device = _init_process_group(world_size)
        _make_groups(parallel, seed, distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60))
        return replace(_read_parallel_state(parallel, device), rows=rows)

    @property
    def degrees(self) -> dict[str, int]:
        """The layout: what decides which part of the model, and of the data, a rank has."""
        return {name: getattr(self, name) for name in ("world_size", "tp", "pp", "vpp", "cp", "ep", "etp")}

    @property
    def shard(self) -> Shard:
        """Which tokens of a micro-batch are this rank's."""
        return Shard(self.cp, self.cp_rank, self.tp, self.tp_rank, self.rows)

    @property
    def micro_batch_multiple(self) -> int:
        """Micro-batches of a step come in multiples of this: interleaved pipelines take them in rounds."""
        return self.pp if self.vpp > 1 else 1

    def barrier(self) -> None:
        dist.barrier(group=self.world_group_cpu)

    def any(self, flag: bool) -> bool:
        """Collective: whether `flag` is true on some rank."""
        total = torch.tensor([int(flag)])
        dist.all_reduce(total, group=self.world_group_cpu)
        return bool(total)

    def first(self, value: Any) -> Any:
        """Collective: rank 0's (picklable) value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.world_group_cpu)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Collective: every rank's (small, picklable) value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.world_group_cpu)
        return values

    def to_leader(self, value: Any) -> list[Any] | None:
        """Collective over a replica: its ranks' (picklable) values on its leader, None elsewhere."""
        return _to_first(value, self.replica_group)

    def to_main(self, value: Any) -> list[Any] | None:
        """Collective over the leaders: their (picklable) values on rank 0, None elsewhere, also on other ranks."""
        return None if self.leaders_group is None else _to_first(value, self.leaders_group)

    def leave(self) -> None:
        """Give the layout up and stay in the process group: the same ranks may `init` another layout."""
        parallel_state.destroy_model_parallel()

    def destroy(self) -> None:
        """Leave the process group; gloo aborts at interpreter exit otherwise."""
        self.leave()
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Imagined:
    """What building a model takes of a Topology, for a rank that is not there."""

    rank: int
    tp: int
    pp: int
    ep: int
    cp: int
    etp: int
    vpp: int
    is_first_stage: bool
    is_last_stage: bool
    device: torch.device


@contextmanager
def imagined(parallel: ParallelConfig, rank: int) -> Iterator[Imagined]:
    """Inside, this process is `rank` of the smallest world that holds the layout's model, without context parallelism.

    Its process groups are torch's fake ones: collectives return at once and move nothing.
    """
    # Registers the backend "fake"; torch has it in this place since 2.0, and no public one.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a process that is in a process group cannot imagine another"
    parallel = parallel.model_copy(update={"cp": 1})
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=fewest_ranks(parallel))
    try:
        _make_groups(parallel, seed=1, create_gloo_process_groups=False)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        ends = {"is_first_stage": stage == 0, "is_last_stage": stage == parallel.pp - 1}
        yield Imagined(rank, **parallel.model_dump(), **ends, device=META)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def all_to_all(outgoing: Sequence[Any], group: dist.ProcessGroup) -> list[Any]:
    """Collective over a gloo group: what its ranks have for this one. `outgoing`: what this one has for each."""
    sent = [torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8) for value in outgoing]
    send_sizes = torch.tensor([part.numel() for part in sent])
    receive_sizes = torch.empty_like(send_sizes)
    dist.all_to_all_single(receive_sizes, send_sizes, group=group)
    received = torch.empty(int(receive_sizes.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(sent), receive_sizes.tolist(), send_sizes.tolist(), group=group)
    return [pickle.loads(part.numpy().data) for part in received.split(receive_sizes.tolist())]


def _to_first(value: Any, group: dist.ProcessGroup) -> list[Any] | None:
    first = dist.get_global_rank(group, 0)
    values: list[Any] | None = [None] * group.size() if dist.get_rank() == first else None
    dist.gather_object(value, values, dst=first, group=group)
    return values


def _init_process_group(world_size: int) -> torch.device:
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        # Slurm may show each rank its own GPU alone
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus > 1:
            raise ConfigError(f"rank {local} of this machine has no GPU: there are {gpus}; start at most so many on it")
        device = torch.device("cuda", 0 if gpus == 1 else local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    elif world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # every rank would take all cores of the machine
    if dist.is_initialized():
        return device
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    return device


def _make_groups(parallel: ParallelConfig, seed: int, **options: Any) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        **options,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _read_parallel_state(parallel: ParallelConfig, device: torch.device) -> Topology:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    cp_rank = parallel_state.get_context_parallel_rank()
    dp_rank = parallel_state.get_data_parallel_rank()
    world_cpu = dist.new_group(backend="gloo", timeout=TIMEOUT)
    where: list[tuple[int, ...]] = [()] * world_size  # (dp, pp, cp, tp) of each rank
    dist.all_gather_object(where, (dp_rank, pp_rank, cp_rank, tp_rank), group=world_cpu)
    dp = parallel_state.get_data_parallel_world_size()
    replicas = [[r for r in range(world_size) if where[r][0] == d] for d in range(dp)]
    leaders = [replica[0] for replica in replicas]
    assert all(where[r] == (d, 0, 0, 0) for d, r in enumerate(leaders)), f"leaders {leaders} of {where}"
    replica_group = _own_group(replicas, rank)
    assert replica_group is not None, f"rank {rank} is in no replica of {replicas}"
    return Topology(
        rank=rank,
        world_size=world_size,
        **parallel.model_dump(),
        dp=dp,
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        cp_rank=cp_rank,
        dp_rank=dp_rank,
        is_first_stage=pp_rank == 0,
        is_last_stage=pp_rank == parallel.pp - 1,
        is_leader=rank in leaders,
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        tokens_group=parallel_state.get_tensor_and_context_parallel_group(),
        replica_group=replica_group,
        leaders_group=_own_group([leaders], rank),
        world_group_cpu=world_cpu,
    )


def _own_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """Make all `groups` over gloo, as every rank must; the one `rank` is in, or None."""
    own = None
    for ranks in groups:
        group = dist.new_group(ranks, timeout=TIMEOUT, backend="gloo")
        if rank in ranks:
            own = group
    return own
