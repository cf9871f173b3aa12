"""Weights to servers by broadcast, over gloo or NCCL, without touching a disk.

Used by publish on rank 0, which is rank 0 of a process group with every server that is up; the group is kept while
that set stays the same. A failure leaves servers with parts of two versions: they are stamped so, and sent to again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from megasapo.rollout.client import ServerClient
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import INCOMPLETE, RolloutError
from megasapo.rollout.watch import Server
from megasapo.rollout.weight_group import WeightGroup, host_store

log = logging.getLogger(__name__)
Bucket = list[tuple[str, torch.Tensor]]
Member = tuple[int, str, int]  # a server and its incarnation


class Broadcast:
    """publish.Delivery over a process group: pause, begin, send, end, flush, stamp, resume."""

    weights_dir: Path | None = None  # only another broadcast helps a server that missed one

    def __init__(self, fleet: Fleet, device: torch.device, *, timeout_s: float) -> None:
        self._fleet, self._device, self._timeout_s = fleet, device, timeout_s
        self._group: WeightGroup | None = None
        self._members: tuple[Member, ...] = ()
        self._groups_made = 0
        self._version = 0
        self._servers: list[Server] = []
        self._sessions: list[bool] = []
        self._touched = False  # some server may hold parts of two versions

    def open(self, version: int) -> None:
        self._version, self._touched, self._servers, self._sessions = version, False, [], []
        self._servers = self._fleet.wait_ready()
        members = tuple((s.index, s.url, s.incarnation) for s in self._servers)
        if members != self._members or self._group is None:
            self.close()
            self._make_group()
            self._members = members
        self._each(lambda c: c.pause(self._fleet.cfg.on_publish))
        self._sessions = self._each(lambda c: c.begin_update())

    def send(self, bucket: Bucket) -> None:
        """One message for each dtype: the receiver views slices of one byte tensor, which must stay aligned."""
        by_dtype: dict[torch.dtype, Bucket] = {}
        for name, tensor in bucket:
            by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
        for dtype, tensors in by_dtype.items():
            self._send(str(dtype).removeprefix("torch."), tensors)

    def finish(self) -> list[Server]:
        with_session = [s for s, open_ in zip(self._servers, self._sessions, strict=True) if open_]
        self._each(lambda c: c.end_update(), with_session)
        self._each(lambda c: c.flush(self._fleet.cfg.on_publish))
        self._each(lambda c: c.stamp(self._version))
        self._each(lambda c: c.resume())
        return self._servers

    def settle(self) -> None:
        """Nothing is left behind."""

    def abandon(self) -> None:
        """Stamp what may be half-written before it samples again; a server that cannot be reached stays paused."""

        async def give_up(client: ServerClient) -> None:
            with suppress(RolloutError):
                if self._touched:
                    await client.stamp(INCOMPLETE)
                with suppress(RolloutError):  # it may have ended, or another learner's that was killed may be open
                    await client.end_update()
                await client.resume()

        for server in self._servers:
            self._fleet.run(give_up(self._fleet.control(server)))
        self._sessions = []
        self.close()

    def close(self) -> None:
        """Leave the group, and have the servers that are still there leave it."""
        if self._group is None:
            return
        group, self._group, members, self._members = self._group, None, self._members, ()

        async def leave(server: Server) -> None:
            with suppress(RolloutError):  # restarted since: it is in no group
                await self._fleet.control(server).destroy_group(group.name)

        group.close()
        for index, url, incarnation in members:
            server = self._fleet.servers[index]
            if server.up and (server.url, server.incarnation) == (url, incarnation):
                self._fleet.run(leave(server))

    def _send(self, dtype: str, tensors: Bucket) -> None:
        flat = torch.cat([t.detach().to(self._device).reshape(-1).view(torch.uint8) for _, t in tensors])
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # the broadcast runs in another thread
        group, names, shapes = self._group, [n for n, _ in tensors], [list(t.shape) for _, t in tensors]
        assert group is not None
        self._touched = True
        receiving = self._start(
            lambda c: c.update_from_distributed(
                names=names, dtypes=[dtype] * len(names), shapes=shapes, group=group.name, flattened=True
            )
        )
        _wait([*receiving, _in_thread(lambda: group.broadcast(flat))])

    def _make_group(self) -> None:
        sizes = [
            _ranks_of(info, s.url) for s, info in zip(self._servers, self._each(ServerClient.server_info), strict=True)
        ]
        world_size = 1 + sum(sizes)
        address = _address_facing(self._servers[0].url)
        self._groups_made += 1
        name = f"megasapo-{os.getpid()}-{self._groups_made}"
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        store = host_store(address, world_size, self._timeout_s)
        offsets = {s.index: 1 + sum(sizes[:i]) for i, s in enumerate(self._servers)}
        joining = [
            self._fleet.submit(
                self._fleet.control(s).init_group(
                    master_address=address,
                    master_port=store.port,
                    rank_offset=offsets[s.index],
                    world_size=world_size,
                    name=name,
                    backend=backend,
                )
            )
            for s in self._servers
        ]
        joined = _in_thread(
            lambda: WeightGroup.join(address, store.port, 0, world_size, name, backend, self._timeout_s, store=store)
        )
        _wait([*joining, joined])
        self._group = joined.result()
        log.info("weight group %s: %d servers over %s", name, len(self._servers), backend)

    def _start(self, call: Callable[[ServerClient], Any]) -> list[futures.Future[Any]]:
        return [self._fleet.submit(call(self._fleet.control(s))) for s in self._servers]

    def _each(
        self, call: Callable[[ServerClient], Awaitable[Any]], servers: Sequence[Server] | None = None
    ) -> list[Any]:
        """The same call to all at once; results in their order."""
        clients = [self._fleet.control(s) for s in (self._servers if servers is None else servers)]

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(*(call(c) for c in clients))

        return self._fleet.run(all_at_once())


def _ranks_of(info: dict[str, Any], url: str) -> int:
    """How many members of the group a server is."""
    for key in ("dp_size", "pp_size"):
        if int(info.get(key) or 1) != 1:
            raise RolloutError(
                f"{url} runs with {key}={info[key]}, broadcast needs 1: start more servers, or use rollout.publish=disk"
            )
    return int(info.get("tp_size") or 1)


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


def _wait(parts: list[futures.Future[Any]]) -> None:
    """Until all are done, or one has failed: then its error, at once."""
    done, _ = futures.wait(parts, return_when=futures.FIRST_EXCEPTION)
    for part in done:
        part.result()
