"""Weights to servers by way of an HF directory RUN/weights/v{version}, which servers on a shared file system load.

Used by publish on rank 0. The newest directory stays: a server that was restarted loads it from there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from megasapo.rollout.client import ServerClient
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.watch import Server

log = logging.getLogger(__name__)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class DiskDelivery:
    """publish.Delivery by files. One safetensors file for each bucket, so that rank 0 never holds more than one."""

    def __init__(self, fleet: Fleet, run_dir: Path, model_dir: Path) -> None:
        self.weights_dir: Path | None = None
        self._fleet, self._root, self._model_dir = fleet, Path(run_dir).absolute() / "weights", Path(model_dir)
        self._version = 0
        self._weight_map: dict[str, str] = {}
        self._bytes = 0

    def open(self, version: int) -> None:
        self._version, self._weight_map, self._bytes = version, {}, 0
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)

    def send(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        if not bucket:
            return
        file = f"model-{len(set(self._weight_map.values())) + 1:05d}.safetensors"
        for name, tensor in bucket:
            if name in self._weight_map:
                raise RolloutError(f"the export has tensor {name!r} twice")
            self._weight_map[name] = file
            self._bytes += tensor.nbytes
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket}
        save_file(tensors, self._unfinished / file, metadata={"format": "pt"})

    def finish(self) -> list[Server]:
        target = self._complete()
        up = self._fleet.wait_ready()
        updated = self._fleet.run(self._load_all(up, target))
        self.weights_dir = target
        return updated

    def settle(self) -> None:
        for old in self._root.iterdir():
            if old != self.weights_dir:
                try:
                    shutil.rmtree(old)
                except OSError as e:  # a server may still have it mapped; the next publish tries again
                    log.warning("%s is left behind: %s", old, e)

    def abandon(self) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def close(self) -> None:
        """Nothing is held open."""

    @property
    def _unfinished(self) -> Path:
        return self._root / f".v{self._version}.unfinished"

    def _complete(self) -> Path:
        """The finished directory: index, and what lies beside the weights in the model's own directory."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
        (self._unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
        for file in sorted(self._model_dir.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and not file.name.startswith("."):
                shutil.copyfile(file, self._unfinished / file.name)
        target = self._root / f"v{self._version}"
        shutil.rmtree(target, ignore_errors=True)  # of this version again, after a server came back
        self._unfinished.rename(target)
        return target

    async def _load_all(self, servers: list[Server], directory: Path) -> list[Server]:
        results = await asyncio.gather(
            *(_load(self._fleet.control(s), directory, self._version) for s in servers), return_exceptions=True
        )
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, RolloutError):
                raise result
            if result is not None:
                log.warning("%s did not load version %d: %s", server.url, self._version, result)
        updated = [s for s, result in zip(servers, results, strict=True) if result is None]
        if not updated:
            raise RolloutError(f"no server loaded {directory}: {results[0]}")
        return updated


async def _load(client: ServerClient, directory: Path, version: int) -> None:
    async with client.paused():
        await client.update_from_disk(directory, version)
