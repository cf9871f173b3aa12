"""Weights to servers bucket by bucket while all of them are paused, over a channel: broadcast or shared memory.

Used by publish on rank 0. A failure leaves servers with parts of two versions: they are stamped so, and sent to again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent import futures
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from megasapo.checksum import tensor_digest
from megasapo.rollout.client import ServerClient, Update
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import RolloutError, parse_version
from megasapo.rollout.servers import Server
from megasapo.rollout.weight_files import Bucket

log = logging.getLogger(__name__)


class Channel(Protocol):
    """How tensors get to servers. After a failure it is closed, and opened again for the next attempt."""

    def open(self, servers: Sequence[Server]) -> None:
        """These get what is sent from now on; they may be others than the last time."""
        ...

    def send(self, tensors: Bucket) -> list[futures.Future[Any]]:
        """Tensors of one dtype, copied; they have arrived when all futures are done. Nothing is sent if it raises."""
        ...

    def close(self) -> None: ...


class OnlineDelivery:
    """publish.Delivery over a channel. A bucket is on its way while the next one is gathered."""

    weights_dir: Path | None = None  # only another publish helps a server that missed one

    def __init__(self, fleet: Fleet, channel: Channel, *, changed_only: bool = False) -> None:
        """`changed_only`: leave out tensors that all servers have already, bit for bit."""
        self._fleet, self._channel, self._changed_only = fleet, channel, changed_only
        self._servers: list[Server] = []
        self._starts: list[tuple[int, int]] = []  # of each, to see that it is not started again meanwhile
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
        self._starts = _starts(self._servers)
        self._channel.open(self._servers)
        if self._changed_only:  # all servers say what they have: one may have been started again without our notice
            infos = asked(self._fleet, self._servers, ServerClient.model_info)
            if any(parse_version(info.get("weight_version")) != self._held_version for info in infos):
                self._held = {}
        contexts = [self._fleet.control(s).updating(version, self._fleet.cfg.on_publish) for s in self._servers]
        entered = together(self._fleet, [context.__aenter__() for context in contexts])
        self._updates = [(c, u) for c, u in zip(contexts, entered, strict=True) if isinstance(u, Update)]
        raise_first(entered)

    def send(self, bucket: Bucket) -> None:
        """One message for each dtype: the receiver views slices of one byte tensor, which must stay aligned."""
        by_dtype: dict[torch.dtype, Bucket] = {}
        for name, tensor in self._changed(bucket) if self._changed_only else bucket:
            by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
        for tensors in by_dtype.values():
            self._wait()  # for the last one: no more than one copy of a bucket is alive
            self._on_the_way = self._channel.send(tensors)
            for _, update in self._updates:
                update.begun = True

    def finish(self) -> list[Server]:
        """The servers that have all of it, none of them in doubt. RolloutError when there is no such server."""
        self._wait()
        if _starts(self._servers) != self._starts:  # one without sessions takes the rest without the beginning
            raise RolloutError("a server was started again during the update")
        updates, self._updates = self._updates, []
        ended = together(self._fleet, [context.__aexit__(None, None, None) for context, _ in updates])
        updated = succeeded(self._servers, ended, f"finish version {self._version}")
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
        together(self._fleet, [c.__aexit__(RolloutError, error, None) for c, _ in updates])  # they raise it again
        self._channel.close()

    def close(self) -> None:
        self._channel.close()

    def _wait(self) -> None:
        on_the_way, self._on_the_way = self._on_the_way, []
        wait_for(on_the_way)

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


def _starts(servers: Sequence[Server]) -> list[tuple[int, int]]:
    return [(s.incarnation, s.restarts) for s in servers]


def together(fleet: Fleet, calls: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All at once; results, or the RolloutErrors in their places."""

    async def gathered() -> list[Any]:
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = fleet.run(gathered())
    raise_first([o for o in outcomes if not isinstance(o, RolloutError)])
    return outcomes


def asked(
    fleet: Fleet, servers: Sequence[Server], call: Callable[[ServerClient], Coroutine[Any, Any, Any]]
) -> list[Any]:
    """The same call to all at once; results in their order, or the first error."""
    outcomes = together(fleet, [call(fleet.control(s)) for s in servers])
    raise_first(outcomes)
    return outcomes


def succeeded(servers: Sequence[Server], outcomes: Sequence[Any], what: str) -> list[Server]:
    """The servers whose outcome is no error; the others are logged. RolloutError when there is none."""
    updated = []
    for server, outcome in zip(servers, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            log.warning("%s did not %s: %s", server.url, what, outcome)
        else:
            updated.append(server)
    if not updated:
        raise RolloutError(f"no server could {what}: {outcomes[0]}")
    return updated


def raise_first(outcomes: Sequence[Any]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def wait_for(parts: Sequence[futures.Future[Any]]) -> None:
    """Until all are done, or one has failed: then its error, at once."""
    done, _ = futures.wait(parts, return_when=futures.FIRST_EXCEPTION)
    for part in done:
        part.result()


def tensor_ranks(fleet: Fleet, servers: Sequence[Server]) -> list[int]:
    """The tensor-parallel size of each. RolloutError for servers that are parallel in other ways."""
    sizes = []
    for server, info in zip(servers, asked(fleet, servers, ServerClient.server_info), strict=True):
        for key in ("dp_size", "pp_size"):
            if int(info.get(key) or 1) != 1:
                raise RolloutError(
                    f"{server.url} runs with {key}={info[key]}, rollout.publish=distributed and tensor need 1: start "
                    "more servers, or use rollout.publish=disk"
                )
        sizes.append(int(info.get("tp_size") or 1))
    return sizes
