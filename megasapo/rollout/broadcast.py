"""Weights to servers by broadcast, over gloo or NCCL, without touching a disk.

An online.Channel for publish on rank 0, which is rank 0 of a process group with every server that is up; the group is
kept while that set stays the same.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import torch

from megasapo.rollout.fleet import Fleet
from megasapo.rollout.online import tensor_ranks, wait_for
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.servers import Server
from megasapo.rollout.weight_files import Bucket
from megasapo.rollout.weight_group import WeightGroup, host_store

log = logging.getLogger(__name__)


class Broadcast:
    """An online.Channel. Every message is one tensor of bytes."""

    def __init__(self, fleet: Fleet, device: torch.device, *, timeout_s: float) -> None:
        """`device`: CUDA means NCCL. `timeout_s`: of joining and of each message."""
        self._fleet, self._device, self._timeout_s = fleet, device, timeout_s
        self._group: WeightGroup | None = None
        self._servers: list[Server] = []
        self._members: list[tuple[str, int]] = []  # their URLs and incarnations when the group was made
        self.groups_made = 0

    def open(self, servers: Sequence[Server]) -> None:
        members = [(s.url, s.incarnation) for s in servers]
        if members != self._members or self._group is None:
            self.close()
            self._servers = list(servers)
            self._make_group()
            self._members = members

    def send(self, tensors: Bucket) -> list[futures.Future[Any]]:
        flat = torch.cat([t.detach().to(self._device).reshape(-1).view(torch.uint8) for _, t in tensors])
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # the broadcast runs in another thread
        group, dtype = self._group, str(tensors[0][1].dtype).removeprefix("torch.")
        assert group is not None
        shapes = {name: list(t.shape) for name, t in tensors}
        calls = [self._fleet.control(s).update_from_distributed(group.name, dtype, shapes) for s in self._servers]
        return [*map(self._fleet.submit, calls), _in_thread(lambda: group.broadcast(flat))]

    def close(self) -> None:
        """Leave the group, and have the servers that are still there leave it."""
        if self._group is None:
            return
        group, self._group, members, self._members = self._group, None, self._members, []

        async def leave(server: Server) -> None:
            with suppress(RolloutError):  # restarted since: it is in no group
                await self._fleet.control(server).destroy_group(group.name)

        group.close()
        for server, member in zip(self._servers, members, strict=True):
            if server.up and (server.url, server.incarnation) == member:
                self._fleet.run(leave(server))

    def _make_group(self) -> None:
        sizes = tensor_ranks(self._fleet, self._servers)
        world_size = 1 + sum(sizes)
        address = _address_facing(self._servers[0].url)
        self.groups_made += 1
        name = f"megasapo-{os.getpid()}-{self.groups_made}"
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        store = host_store(address, world_size, self._timeout_s)
        where: dict[str, str | int] = {"master_address": address, "master_port": store.port, "world_size": world_size}
        where |= {"group_name": name, "backend": backend}
        calls = [
            self._fleet.control(s).init_group(rank_offset=1 + sum(sizes[:i]), **where)
            for i, s in enumerate(self._servers)
        ]
        joined = _in_thread(
            lambda: WeightGroup.join(address, store.port, 0, world_size, name, backend, self._timeout_s, store=store)
        )
        wait_for([*map(self._fleet.submit, calls), joined])
        self._group = joined.result()
        log.info("weight group %s: %d servers over %s", name, len(self._servers), backend)


def _address_facing(url: str) -> str:
    """This machine's address on the way to a server."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((parts.hostname, parts.port or 80))  # sends nothing
        return s.getsockname()[0]


def _in_thread(work: Callable[[], Any]) -> futures.Future[Any]:
    """Run something that may block for long, in a thread that does not keep the process alive."""
    future: futures.Future[Any] = futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as e:
            future.set_exception(e)

    threading.Thread(target=run, name="weight-broadcast", daemon=True).start()
    return future
