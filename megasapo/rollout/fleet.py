"""The fleet of rollout servers: who is up, which weights each has, and one way to ask them all (types.Engine).

The learner's rank 0 starts it (`Fleet.start`): it spawns or connects, watches from a thread of its own, restarts what
died. The other data-parallel leaders only connect to its URLs (`Fleet.connect`). The rollout source calls `generate`
from its event loop, publish calls the rest from the main thread. It must not import torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from megasapo import keys
from megasapo.metrics import Metric, Sum
from megasapo.rollout.client import ServerClient
from megasapo.rollout.dispatch import Dispatch
from megasapo.rollout.limits import ModelLimits, check_blocks, check_quantization, refuse_quantising_flags
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.servers import Server
from megasapo.rollout.spawn import free_port, with_routing
from megasapo.rollout.watch import Watch
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams

log = logging.getLogger(__name__)
T = TypeVar("T")


class Fleet:
    """All servers of a run, as one Engine. Make it with `start` or `connect`; `stop` it, or use it as a context."""

    def __init__(self, cfg: RolloutConfig, urls: Sequence[str], limits: ModelLimits, leader_index: int) -> None:
        self.cfg = cfg
        self.urls = tuple(urls)
        self.version: int | None = None  # what `generate` accepts; None until the first publish: anything
        self.servers = [Server(index=i, url=url) for i, url in enumerate(self.urls)]
        self._keys = keys.read(cfg.api_key_file, cfg.admin_api_key_file, environment=bool(cfg.servers))
        self._watch: Watch | None = None
        self._owns = False  # this process may change weights, and restarts what it has spawned
        self._dispatch = Dispatch(
            cfg, self.servers, limits, self._keys, leader_index, newest=lambda: self.version, check=self.check
        )

    @classmethod
    def start(cls, cfg: RolloutConfig, model_path: str | Path, run_dir: str | Path, *, routing: bool = False) -> Fleet:
        """Spawn `rollout.spawn` servers, or connect to `rollout.servers`, and wait until all answer.

        `routing`: those that are spawned can return the experts they chose; running ones must have been started so.
        Those that are spawned ask for a key, a new one in `run_dir` if rollout.api_key_file names none.
        Raises RolloutError with the log's tail when one does not in rollout.start_timeout_s. One process of a run
        calls it, the first of its leaders.
        """
        cfg = with_routing(cfg) if routing else cfg
        urls = cfg.servers or tuple(f"http://127.0.0.1:{free_port()}" for _ in range(cfg.spawn))
        limits = ModelLimits.read(model_path)
        served = Path(model_path)
        if not cfg.servers:
            limits.check_engine(cfg.engine)
            served = served_model(cfg, served, Path(run_dir))
            cfg = _with_key(cfg, Path(run_dir).absolute() / "api_key")
        fleet = cls(cfg, urls, limits, leader_index=0)
        watch = Watch(cfg, fleet.servers, served, Path(run_dir), fleet._keys, fleet._dispatch.lost)
        fleet._watch, fleet._owns = watch, True
        try:
            watch.start()
            if cfg.quantization != "none":
                fleet.check_quantization()
        except BaseException:
            watch.stop()
            raise
        fleet.urls = tuple(s.url for s in fleet.servers)  # a port that was taken meanwhile has been replaced
        return fleet

    @classmethod
    def connect(
        cls, cfg: RolloutConfig, urls: Sequence[str], model_path: str | Path, *, leader_index: int = 0
    ) -> Fleet:
        """A fleet that another process started; it only generates, and looks whether its servers are there.

        `cfg`: that of the fleet that started them.
        """
        fleet = cls(cfg, urls, ModelLimits.read(model_path), leader_index)
        theirs = cfg.model_copy(update={"servers": tuple(urls)})
        fleet._watch = Watch(theirs, fleet.servers, Path(model_path), None, fleet._keys, fleet._dispatch.lost)
        fleet._watch.start_looking()
        return fleet

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop what this fleet started. Twice is once."""
        if self._watch is not None:
            self._watch.stop()

    async def close(self) -> None:
        """Close the connections of `generate`, in the event loop that used it."""
        await self._dispatch.close()

    # --- generation ---

    async def generate(
        self,
        input_ids: list[tuple[int, ...]],
        sampling: list[SamplingParams],
        *,
        return_routed_experts: bool = False,
    ) -> list[Completion]:
        """One completion for each prompt, in order; see types.Engine.

        Deterministic fleets send one list request to the server that `leader_index` names, others one request a prompt:
        those of a group to one server, the next group to the server with the fewest tokens outstanding. RolloutError
        after rollout.retry_for_s of failures.
        """
        return await self._dispatch.generate(input_ids, sampling, routed=return_routed_experts)

    def take_metrics(self) -> dict[str, Metric]:
        """Retries by cause, hedges and restarts of servers since the last call, as Sums."""
        counts = self._dispatch.take_counts()
        if self._owns:
            assert self._watch is not None
            counts["rollout/server_restarts"] = self._watch.take_restarts()
        return {name: Sum(n) for name, n in sorted(counts.items())}

    # --- servers and versions: publish, on the rank that started the fleet ---

    @property
    def failure(self) -> Exception | None:
        """What stopped the watch, if this rank owns the servers: the last of them is out of restarts."""
        return None if self._watch is None else self._watch.failure

    def check(self) -> None:
        """Raise `failure`."""
        if self.failure is not None:
            raise RolloutError(str(self.failure)) from self.failure

    def stale(self) -> bool:
        """Whether a server that is up lacks the current version and only a publish can give it: publish again then.

        Servers that are down or starting do not count, nor do those the watch brings up to date from disk.
        """
        return self._owns and self._watch is not None and any(self._watch.needs_publish(s) for s in self.servers)

    def wait_ready(self) -> list[Server]:
        """The servers that answer now, as soon as one does. RolloutError after rollout.start_timeout_s without."""
        deadline = time.monotonic() + self.cfg.start_timeout_s
        while True:
            self.check()
            answering = self.run(self._owner().answering())
            if answering:
                return answering
            if time.monotonic() > deadline:
                urls = ", ".join(self.urls)
                raise RolloutError(f"no rollout server came up in {self.cfg.start_timeout_s:g} s: {urls}")
            time.sleep(0.1)

    def control(self, server: Server) -> ServerClient:
        """The client for weight and pause calls, to be used inside `run` only."""
        return self._owner().client(server)

    def submit(self, work: Coroutine[Any, Any, T]) -> Any:
        """Start a coroutine in the fleet's own event loop: a concurrent.futures.Future."""
        return self._owner().submit(work)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the fleet's own event loop and wait for it."""
        return self.submit(work).result()

    def check_quantization(self) -> None:
        """RolloutError unless the servers of `rollout.servers` hold their model as rollout.quantization says."""
        if not self.cfg.servers:
            return  # this run started them, on the model that it chose
        for server in self.wait_ready():
            client = self.control(server)
            info = self.run(client.server_info()) | self.run(client.model_info())
            check_quantization(server.url, info, self.cfg.quantization)

    def begin_publish(self) -> None:
        """No server is judged or brought up to date by the watch until `end_publish`."""
        self.run(self._owner().hold())

    def end_publish(self, version: int, updated: Sequence[Server], weights_dir: Path | None) -> None:
        """`updated` now have `version`, the others are stale; `weights_dir` is where they can still get it from."""
        self.version = version
        self.run(self._owner().release(version, updated, weights_dir))

    def abandon_publish(self) -> None:
        """The publish failed: the servers stay at what they say they have."""
        self.run(self._owner().release(self.version, None, None))

    def _owner(self) -> Watch:
        if self._watch is None or not self._owns:
            raise RolloutError("this process only connected to the fleet; the one that started it must do this")
        return self._watch


def _with_key(cfg: RolloutConfig, new: Path) -> RolloutConfig:
    """The same settings with a key for servers of this run: others on this machine can reach them."""
    if cfg.spawn_command and not any("{api_key_file}" in part for part in cfg.spawn_command):
        log.warning("rollout.spawn_command has no {api_key_file}: whoever is on this machine can use its servers")
    if cfg.api_key_file is not None:
        return cfg
    keys.make(new)
    return cfg.model_copy(update={"api_key_file": str(new)})


def served_model(cfg: RolloutConfig, model: Path, run_dir: Path) -> Path:
    """What servers of this run start from: the learner's model, or its quantised copy in the run's directory."""
    flags = (*cfg.spawn_command, *cfg.server_args)
    if cfg.quantization == "none":
        refuse_quantising_flags(flags)
        return model
    if cfg.engine == "sglang":
        check_blocks(model, flags)
    from megasapo.rollout.quantise import rollout_model  # imports torch

    return rollout_model(model, run_dir / "rollout_model")
