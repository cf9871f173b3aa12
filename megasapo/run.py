"""What every command with a run directory does: lay it out, keep the resolved configuration, time phases, stop cleanly.

Called by train.py and sft.py; imports no torch at module level.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megasapo import config, launch
from megasapo.config import Config, ConfigError


def parse(command: str, description: str, argv: list[str]) -> tuple[Config, int]:
    """CONFIG.yaml, overrides and --nproc of a learner command. Exits on --help or unusable arguments."""
    parser = argparse.ArgumentParser(prog=f"megasapo {command}", description=description)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings over the file's, values as YAML")
    parser.add_argument("--nproc", type=int, help="ranks on this machine (default: as few as the layout needs)")
    args = parser.parse_args(argv)
    cfg = config.load(args.config, args.overrides)
    _check_files(cfg)
    return cfg, check_nproc(cfg.parallel, args.nproc)


def _check_files(cfg: Config) -> None:
    """Refuse what is not there before any rank starts."""
    if not (Path(cfg.model.path) / "config.json").is_file():
        raise ConfigError(f"model.path={cfg.model.path}: no config.json there; give the directory of an HF model")
    files = {"data.train": cfg.data.train, "data.eval": cfg.data.eval, "sft.data": cfg.sft.data}
    for name, path in files.items():
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{name}={path}: no such file")


def check_nproc(parallel: config.ParallelConfig, nproc: int | None) -> int:
    """The number of local ranks: what was asked for, or as few as the layout needs."""
    fewest = parallel.pp * math.lcm(parallel.tp, parallel.ep)
    if nproc is not None and (nproc < 1 or nproc % fewest):
        raise ConfigError(
            f"--nproc {nproc} is no multiple of pp({parallel.pp})*lcm(tp({parallel.tp}), ep({parallel.ep}))={fewest}: "
            f"use a multiple of {fewest} or change parallel"
        )
    return nproc or fewest


def on_ranks(command: str, argv: list[str], nproc: int) -> int | None:
    """Start the ranks and return their exit code; None in a process that is (or may itself be) the only rank."""
    rank = f"rank {os.environ['RANK']} " if launch.is_rank() else ""
    logging.basicConfig(level=logging.WARNING, format=f"{rank}%(levelname)s %(name)s: %(message)s")
    if launch.is_rank():
        launch.die_with_parent()
        return None
    return launch.run(command, argv, nproc) if nproc > 1 else None


class RunDir:
    """The directory of one run; see DESIGN section 3 for what is where."""

    def __init__(self, cfg: Config, *, is_main: bool):
        self.path = cfg.run_dir
        self._is_main = is_main
        if is_main:
            for name in ("logs", "checkpoints", "rollouts"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            config.save(cfg, self.path / "config.yaml")
            (self.path / "stop").unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """What `done` says, when the run has ended by itself."""
        path = self.path / "done"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, **facts: Any) -> None:
        if self._is_main:
            temporary = self.path / "done.new"
            temporary.write_text(json.dumps(facts))
            os.replace(temporary, self.path / "done")

    def stop_requested(self) -> bool:
        """Someone made the file RUN/stop."""
        return (self.path / "stop").exists()


class Phases:
    """Seconds spent in each named phase of one step; `take` returns them and starts over."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - before

    def take(self) -> tuple[dict[str, float], float]:
        """({"time/<phase>_s": seconds}, seconds of the whole step)."""
        now = time.perf_counter()
        whole, self._started = now - self._started, now
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}_s": s for name, s in seconds.items()} | {"time/step_s": whole}, whole


def report_end(headline: str, places: dict[str, str]) -> None:
    """Say how it ended and where everything is."""
    width = max(len(name) for name in places)
    lines = [headline, *(f"  {name:{width}}  {place}" for name, place in places.items())]
    print("\n" + "\n".join(lines), flush=True)
