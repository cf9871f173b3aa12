"""Weights to servers of this machine through memory that both can map: shared memory, or a GPU's by CUDA IPC.

An online.Channel for publish on rank 0. SGLang's /update_weights_from_tensor takes, for each of its ranks, a pickle of
(name, tensor) pairs as torch's processes hand tensors to one another: the memory's name or handle, offsets and shapes.
On Linux. The way by CUDA IPC has never run.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from concurrent import futures
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import reductions

from megasapo import launch
from megasapo.errors import ConfigError
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.online import raise_first, tensor_ranks
from megasapo.rollout.servers import Server
from megasapo.rollout.shared_memory import managed
from megasapo.rollout.weight_files import Bucket

DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor, as SGLang counts them (sglang.srt.utils.patch_torch)


class Handover:
    """An online.Channel. Every message lies in one allocation, which is freed when all servers have answered."""

    def __init__(self, fleet: Fleet, device: torch.device) -> None:
        """`device`: the tensors' memory; of a GPU, which all ranks of all servers must see, or the CPU's.

        ConfigError where nothing can be shared.
        """
        if device.type == "cpu":
            _check_sharing()
        self._fleet, self._device = fleet, device
        self._servers: list[tuple[Server, int]] = []

    def open(self, servers: Sequence[Server]) -> None:
        self._servers = list(zip(servers, tensor_ranks(self._fleet, servers), strict=True))

    def send(self, tensors: Bucket) -> list[futures.Future[Any]]:
        shared = Shared(tensors, self._device)
        payloads = [[shared.payload() for _ in range(ranks)] for _, ranks in self._servers]
        return [self._fleet.submit(self._hand_over(shared, payloads))]

    def close(self) -> None:
        """Nothing is held open."""

    async def _hand_over(self, shared: Shared, payloads: list[list[str]]) -> None:
        clients = [self._fleet.control(server) for server, _ in self._servers]
        calls = [c.update_from_tensor(p) for c, p in zip(clients, payloads, strict=True)]
        try:
            raise_first(await asyncio.gather(*calls, return_exceptions=True))
        finally:
            shared.free()


def _check_sharing() -> None:
    """Torch counts the holders of shared memory in a process that listens on a socket in the temporary directory."""
    try:
        _allocated(1)
    except RuntimeError as e:
        reason = str(e).splitlines()[0].rpartition(": ")[2]
        raise ConfigError(
            f"rollout.publish=tensor: torch cannot share memory, for which it makes a socket in "
            f"{launch.torch_temporary()}: {reason}; set TMPDIR to a directory that exists, can be written and has a "
            "short name, such as /tmp, or use publish=disk"
        ) from e


class Shared:
    """Copies of tensors of one dtype in one piece of memory that other processes can map."""

    def __init__(self, tensors: Bucket, device: torch.device) -> None:
        size = sum(t.nbytes for _, t in tensors)
        self._file: Path | None = None
        if device.type == "cuda":
            flat = torch.empty(size, dtype=torch.uint8, device=device)
        else:
            storage = _allocated(size)
            # torch unlinks the file when its count of holders falls to nothing, and dies where it is gone already. A
            # server that fails never gives back its part of the count: so it stays above that, and `free` unlinks.
            storage._shared_incref()
            self._file = Path("/dev/shm") / storage._share_filename_cpu_()[1].decode().lstrip("/")
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        self._views: Bucket = []
        for (name, tensor), part in zip(tensors, flat.split([t.nbytes for _, t in tensors]), strict=True):
            self._views.append((name, part.view(tensor.dtype).view(tensor.shape)))
            self._views[-1][1].copy_(tensor.detach())

    def payload(self) -> str:
        """One receiver's; another one needs another, for torch counts the holders of a memory."""
        return base64.b64encode(_Pickler.dumps(self._views)).decode()

    def free(self) -> None:
        """Receivers that still hold the memory keep it for themselves."""
        self._views.clear()
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        else:
            torch.cuda.ipc_collect()


def _allocated(size: int) -> torch.UntypedStorage:
    return managed(lambda: torch.UntypedStorage._new_using_filename_cpu(size))


class _Pickler(ForkingPickler):
    """torch's, but for two things that a server needs which was not forked from this process.

    Shared memory goes by name: by torch's default it is a connection back to us, whose secret SGLang lacks: it dies.
    GPUs go by UUID: their numbers differ with CUDA_VISIBLE_DEVICES, and SGLang puts in its own.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.UntypedStorage):
            obj._shared_incref()  # whoever rebuilds it gives this back
            return reductions.rebuild_storage_filename, (torch.UntypedStorage, *obj._share_filename_cpu_())
        if isinstance(obj, torch.Tensor) and obj.is_cuda:
            rebuild, arguments = reductions.reduce_tensor(obj)
            uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
            return rebuild, (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])
        return NotImplemented
