"""Weights to servers by way of an HF directory RUN/weights/v{version}, which servers on a shared file system load.

Used by publish on rank 0. The newest directory stays: a server that was restarted loads it from there. train.py removes
it when the run is over and the servers are gone.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from megasapo.geometry import read_config
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.online import succeeded, together
from megasapo.rollout.quantise import quantised_config
from megasapo.rollout.servers import Server
from megasapo.rollout.weight_files import Bucket, Writer

log = logging.getLogger(__name__)


class DiskDelivery:
    """publish.Delivery by files. One safetensors file for each bucket, so that rank 0 never holds more than one."""

    def __init__(self, fleet: Fleet, run_dir: Path, model_dir: Path, *, quantised: bool = False) -> None:
        """`model_dir`: of the learner's model, whose config and tokenizer go along; `quantised`: what `send` gets."""
        self.weights_dir: Path | None = None  # where a server that missed it can load what was delivered last
        self._fleet, self._root, self._model_dir = fleet, Path(run_dir).absolute() / "weights", Path(model_dir)
        self._config = quantised_config(read_config(self._model_dir), self._model_dir) if quantised else None
        self._version = 0
        self._writer: Writer | None = None

    def open(self, version: int) -> None:
        self._version, self._writer = version, Writer(self._root / f"v{version}")

    def send(self, bucket: Bucket) -> None:
        assert self._writer is not None
        self._writer.add(bucket)

    def finish(self) -> list[Server]:
        """The servers that have all of it. RolloutError when there is no such server."""
        assert self._writer is not None
        self._writer.finish(self._model_dir, self._config)
        target, up, mode = self._writer.target, self._fleet.wait_ready(), self._fleet.cfg.on_publish
        loads = [self._fleet.control(s).load_from_disk(target, self._version, mode) for s in up]
        updated = succeeded(up, together(self._fleet, loads), f"load {target}")
        self.weights_dir = target
        return updated

    def settle(self) -> None:
        """Nobody needs what was delivered before."""
        for old in self._root.iterdir():
            if old != self.weights_dir:
                _remove(old)  # or, where a server still has it mapped, at the next publish

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()

    def close(self) -> None:
        """Nothing is held open."""


def forget(run_dir: Path) -> None:
    """Remove all that was delivered: no server is left to load it."""
    if (root := run_dir / "weights").exists():
        _remove(root)


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except OSError as e:
        log.warning("%s is left behind: %s", directory, e)
