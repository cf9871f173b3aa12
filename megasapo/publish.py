"""Weights from the learner to the rollout servers: as an HF directory, by broadcast, or through shared memory.

train.py calls a Publisher on every rank; only rank 0 talks to servers, the others take part in the export. A server
that misses an update keeps its old stamp (or "incomplete") and so is never sampled from as if it were new. It knows the
model only as an export of HF-named tensors in buckets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megasapo.checksum import Checksum
from megasapo.rollout.broadcast import Broadcast
from megasapo.rollout.client import ServerClient
from megasapo.rollout.disk import DiskDelivery
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.handover import Handover
from megasapo.rollout.online import Channel, OnlineDelivery, asked
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.quantise import quantise_bucket
from megasapo.rollout.servers import Server
from megasapo.rollout.weight_files import Bucket
from megasapo.sections import RolloutConfig

log = logging.getLogger(__name__)
ATTEMPTS = 3
# `open`, `send` bucket by bucket, `finish`, and `settle` once all is known to be well; or `abandon` at any point
Delivery = DiskDelivery | OnlineDelivery


class Publisher:
    """`publisher(version)` gives the servers the weights that `export` yields. Collective over all ranks."""

    def __init__(
        self,
        export: Callable[[], Iterator[Bucket]],
        fleet: Fleet | None,
        cfg: RolloutConfig,
        *,
        rank: int,
        agree: Callable[[Any], Any],
        run_dir: Path,
        model_dir: Path,
        device: torch.device | None = None,
        verify: bool = False,
    ) -> None:
        """`export`: buckets on rank 0, as many empty lists elsewhere. `fleet`: the started one on rank 0, elsewhere the
        connected one or None.

        `agree(x)` returns rank 0's x on every rank. `device`: the model's; CUDA means NCCL, or CUDA IPC. `verify`:
        compare the embedded servers' checksum with the export's.
        """
        self._export, self._fleet, self._agree, self._verify = export, fleet, agree, verify
        self._quantise = cfg.quantization == "fp8_block"
        self._delivery: Delivery | None = None
        if rank == 0:
            if fleet is None:
                raise ValueError("rank 0 publishes and needs the fleet that it started")
            fleet.check_quantization()  # a server would take weights of the wrong kind without a word
            if cfg.publish == "disk":
                self._delivery = DiskDelivery(fleet, run_dir, model_dir, quantised=self._quantise)
            else:
                channel = _channel(cfg, fleet, device or torch.device("cpu"))
                self._delivery = OnlineDelivery(fleet, channel, changed_only=cfg.publish_changed_only)

    def __call__(self, version: int) -> None:
        """Publish as `version`; RolloutError on every rank when no server could be given it in a few attempts.

        Servers that were down or failed are left stale (`Fleet.stale`): those that come back need a publish again.
        """
        if version < 0:
            raise ValueError(f"weight version {version} is negative")
        for attempt in range(1, ATTEMPTS + 1):
            error = self._try(version)
            if error is None:
                break
            if attempt == ATTEMPTS:
                raise RolloutError(f"version {version} was not published in {ATTEMPTS} attempts: {error}")
            log.warning("publishing version %d, attempt %d: %s", version, attempt, error)
        if self._fleet is not None:
            self._fleet.version = version

    def close(self) -> None:
        """Leave the process group of a broadcast, before the fleet is stopped."""
        if self._delivery is not None:
            self._delivery.close()

    def _try(self, version: int) -> str | None:
        """One attempt; what went wrong, the same text on every rank."""
        updated: list[Server] = []
        if self._fleet is None or self._delivery is None:
            return self._attempt(version, updated)
        failed: str | None = "a collective call"
        self._fleet.begin_publish()
        try:
            failed = self._attempt(version, updated)
            if failed is not None:
                self._delivery.abandon()
        finally:
            if failed is None:
                self._fleet.end_publish(version, updated, self._delivery.weights_dir)
                self._delivery.settle()
            else:
                self._fleet.abandon_publish()
        return failed

    def _attempt(self, version: int, updated: list[Server]) -> str | None:
        """The same, between the fleet's begin and end; on rank 0 `updated` gets the servers that have all of it."""
        failed = self._agree(self._guarded(lambda delivery: delivery.open(version)))
        if failed is None:
            failed = self._agree(self._send_all(updated))
        return failed

    def _guarded(self, step: Callable[[Delivery], Any]) -> str | None:
        """A step on rank 0; its failure is a text that every rank will raise, not one rank's exception."""
        try:
            if self._delivery is not None:
                step(self._delivery)
        except (RolloutError, RuntimeError, OSError) as e:
            return f"{type(e).__name__}: {e}"
        return None

    def _send_all(self, updated: list[Server]) -> str | None:
        """All buckets, then the last word; the export is drained even after a failure, for it is collective."""
        checksum = Checksum() if self._verify else None
        failed: str | None = None
        for bucket in self._export():
            if failed is None:
                failed = self._guarded(partial(self._send, bucket, checksum))
        if failed is None:
            failed = self._guarded(lambda delivery: updated.extend(delivery.finish()))
        if failed is None and checksum is not None:
            failed = self._guarded(lambda _: self._compare(updated, checksum.hexdigest()))
        return failed

    def _send(self, bucket: Bucket, checksum: Checksum | None, delivery: Delivery) -> None:
        """One bucket as the servers get it; what is hashed is what they are to hold."""
        if self._quantise:
            bucket = quantise_bucket(bucket)
        delivery.send(bucket)
        if checksum is not None:
            for name, tensor in bucket:
                checksum.add(name, tensor)

    def _compare(self, servers: list[Server], wanted: str) -> None:
        assert self._fleet is not None
        for server, got in zip(servers, asked(self._fleet, servers, ServerClient.checksum), strict=True):
            if got != wanted:
                raise RolloutError(
                    f"{server.url} holds other weights than were published: checksum {got[:12]}... instead of "
                    f"{wanted[:12]}...; does it keep them in another dtype than the learner's model.dtype?"
                )


def _channel(cfg: RolloutConfig, fleet: Fleet, device: torch.device) -> Channel:
    if cfg.publish == "distributed":
        return Broadcast(fleet, device, timeout_s=cfg.start_timeout_s)
    # the embedded server maps no GPU memory of others
    return Handover(fleet, device if cfg.engine == "sglang" else torch.device("cpu"))
