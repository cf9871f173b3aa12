"""A process group beside the default one, over which the learner broadcasts weights to rollout servers.

It meets SGLang's own `init_custom_process_group`, so both ends must derive the same store keys: a TCP store, the
group's name as prefix, then torch's group construction. The learner (publish) is rank 0, the servers follow; the
embedded server joins through this module too. Neither a default group nor megatron is needed.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


def host_store(master_address: str, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The store of a new group on a free port (`.port`), so that members can be told the port before rank 0 joins."""
    return dist.TCPStore(
        master_address,
        0,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


class WeightGroup:
    """One member of a weight-update group. Made by `join`; not for use from two threads at once."""

    def __init__(self, group: dist.ProcessGroup, store: dist.Store, name: str) -> None:
        self.name = name
        self._group: dist.ProcessGroup | None = group
        self._store = store  # rank 0's store is the server of the others: it must outlive the group

    @staticmethod
    def join(
        master_address: str,
        master_port: int,
        rank: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_s: float,
        store: dist.TCPStore | None = None,
    ) -> WeightGroup:
        """Join as `rank` of `world_size`; returns when all have joined, raises RuntimeError after `timeout_s`.

        `backend` is gloo or nccl. `store` (rank 0 only) is what `host_store` made; otherwise rank 0 listens on
        master_port.
        """
        from torch.distributed import distributed_c10d as c10d

        if backend not in ("gloo", "nccl"):
            raise ValueError(f"weight group {group_name!r}: backend {backend!r} is not gloo or nccl")
        if not 0 <= rank < world_size:
            raise ValueError(f"weight group {group_name!r}: rank {rank} is not below world size {world_size}")
        timeout = timedelta(seconds=timeout_s)
        if store is None:
            store = dist.TCPStore(master_address, master_port, world_size, is_master=rank == 0, timeout=timeout)
        store.set_timeout(timeout)
        # torch offers no public way to make a group without a default one that already spans its members.
        group, _ = c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            c10d.Backend(backend),
            c10d.PrefixStore(group_name, store),
            group_name=group_name,  # type: ignore[arg-type]  # a NewType of str, absent from older torch
            timeout=timeout,
        )
        c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
        return WeightGroup(group, store, group_name)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send (on rank 0) or fill `tensor`, in place; returns when it is done here. Contiguous tensors only."""
        if self._group is None:
            raise RuntimeError(f"weight group {self.name!r} is closed")
        dist.broadcast(tensor, src=0, group=self._group)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()

    def close(self) -> None:
        """Leave the group; members that are still waiting in a broadcast get an error. Twice is once."""
        if self._group is not None:
            group, self._group = self._group, None
            dist.destroy_process_group(group)
