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
from collections.abc import Callable, Coroutine, Sequence
from concurrent import futures
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from megasapo.checksum import tensor_digest
from megasapo.rollout.client import ServerClient, Update
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import RolloutError, parse_version
from megasapo.rollout.watch import Server
from megasapo.rollout.weight_group import WeightGroup, host_store

log = logging.getLogger(__name__)
Bucket = list[tuple[str, torch.Tensor]]
Member = tuple[int, str, int]  # a server and its incarnation


class Broadcast:
    """publish.Delivery over a process group. A bucket is on its way while the next one is gathered."""

    weights_dir: Path | None = None  # only another broadcast helps a server that missed one

    def __init__(self, fleet: Fleet, device: torch.device, *, timeout_s: float, changed_only: bool = False) -> None:
        """`changed_only`: leave out tensors that all servers have already, bit for bit."""
        self._fleet, self._device, self._timeout_s, self._changed_only = fleet, device, timeout_s, changed_only
        self._group: WeightGroup | None = None
        self._members: tuple[Member, ...] = ()
        self._groups_made = 0
        self._servers: list[Server] = []
        self._updates: list[tuple[AbstractAsyncContextManager[Update], Update]] = []  # of each, while it is open
        self._on_the_way: list[futures.Future[Any]] = []
        self._version = 0
        self._held: dict[str, bytes] = {}  # what all servers have since the last version: digests by name
        self._held_version: int | None = None
        self._sent: dict[str, bytes] = {}
        self.tensors_left_out = 0  # of the last version

    def open(self, version: int) -> None:
        self._version, self._sent, self.tensors_left_out = version, {}, 0
        self._servers, self._updates, self._on_the_way = self._fleet.wait_ready(), [], []
        members = tuple((s.index, s.url, s.incarnation) for s in self._servers)
        if members != self._members or self._group is None:
            self.close()
            self._make_group()
            self._members = members
        if self._changed_only and not self._hold(self._held_version):
            self._held = {}
        contexts = [self._fleet.control(s).updating(version, self._fleet.cfg.on_publish) for s in self._servers]
        entered = self._all([context.__aenter__() for context in contexts])
        self._updates = [(c, u) for c, u in zip(contexts, entered, strict=True) if isinstance(u, Update)]
        for outcome in entered:
            if isinstance(outcome, BaseException):
                raise outcome

    def send(self, bucket: Bucket) -> None:
        """One message for each dtype: the receiver views slices of one byte tensor, which must stay aligned."""
        by_dtype: dict[torch.dtype, Bucket] = {}
        for name, tensor in self._changed(bucket) if self._changed_only else bucket:
            by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
        for dtype, tensors in by_dtype.items():
            self._send(str(dtype).removeprefix("torch."), tensors)

    def finish(self) -> list[Server]:
        self._wait()
        updates, self._updates = self._updates, []
        ended = self._all([context.__aexit__(None, None, None) for context, _ in updates])
        for server, outcome in zip(self._servers, ended, strict=True):
            if isinstance(outcome, BaseException):
                log.warning("%s did not finish version %d: %s", server.url, self._version, outcome)
        updated = [s for s, outcome in zip(self._servers, ended, strict=True) if not isinstance(outcome, BaseException)]
        if not updated:
            raise RolloutError(f"no server finished version {self._version}: {ended[0]}")
        whole = len(updated) == len(self._servers)
        self._held, self._held_version = (self._held | self._sent, self._version) if whole else ({}, None)
        return updated

    def settle(self) -> None:
        """Nothing is left behind."""

    def abandon(self) -> None:
        """What may be half-written is stamped so before it samples again."""
        error = RolloutError("the publish was given up")
        updates, self._updates, self._on_the_way = self._updates, [], []
        self._held, self._held_version = {}, None
        self._all([context.__aexit__(RolloutError, error, None) for context, _ in updates])  # they raise it again
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
        self._wait()  # for the last one: no more than one copy of a bucket is alive
        flat = torch.cat([t.detach().to(self._device).reshape(-1).view(torch.uint8) for _, t in tensors])
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # the broadcast runs in another thread
        group, names, shapes = self._group, [n for n, _ in tensors], [list(t.shape) for _, t in tensors]
        assert group is not None
        for _, update in self._updates:
            update.begun = True
        receiving = self._start(
            lambda c: c.update_from_distributed(
                names=names, dtypes=[dtype] * len(names), shapes=shapes, group=group.name, flattened=True
            )
        )
        self._on_the_way = [*receiving, _in_thread(lambda: group.broadcast(flat))]

    def _wait(self) -> None:
        on_the_way, self._on_the_way = self._on_the_way, []
        _wait(on_the_way)

    def _changed(self, bucket: Bucket) -> Bucket:
        """Those of a bucket that some server lacks."""
        changed = []
        for name, tensor in bucket:
            digest = tensor_digest(tensor)
            if self._held.get(name) == digest:
                self.tensors_left_out += 1
            else:
                changed.append((name, tensor))
            self._sent[name] = digest
        return changed

    def _hold(self, version: int | None) -> bool:
        """Whether all servers say that they have it, none having been started again without our notice."""
        infos = self._each(ServerClient.model_info)
        return version is not None and all(parse_version(info.get("weight_version")) == version for info in infos)

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

    def _each(self, call: Callable[[ServerClient], Coroutine[Any, Any, Any]]) -> list[Any]:
        """The same call to all at once; results in their order."""
        outcomes = self._all([call(self._fleet.control(s)) for s in self._servers])
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    def _all(self, calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """All at once; results, or the RolloutErrors in their places."""

        async def together() -> list[Any]:
            return await asyncio.gather(*calls, return_exceptions=True)

        outcomes = self._fleet.run(together())
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, RolloutError):
                raise outcome
        return outcomes


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
