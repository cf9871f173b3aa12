"""What every command with a run directory does: lay it out, keep the resolved configuration, time phases, stop cleanly.

Called by train.py and sft.py; imports no torch at module level.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megasapo import checkpoints, config, jsonl, launch, layout, lock
from megasapo.arguments import Parser
from megasapo.config import Config, ConfigError
from megasapo.placed import placed

if TYPE_CHECKING:
    from megasapo.log.heartbeat import Heartbeat
    from megasapo.mcore.topology import Topology

STOP_FOR = "attempt "  # a stop file that begins so is for the ranks of that attempt alone


def parse(command: str, description: str, argv: list[str]) -> tuple[Config, int]:
    """CONFIG.yaml, overrides and --nproc of a learner command. Exits on --help or unusable arguments."""
    parser = Parser(prog=f"megasapo {command}", description=description)
    parser.add_config()
    parser.add_argument("--nproc", type=int, help="ranks on this machine (default: as few as the layout needs)")
    args = parser.parse_intermixed_args(argv)
    cfg = config.load(args.config, args.overrides)
    check_files(cfg)
    ranks = world_size(cfg.parallel, args.nproc)
    layout.check_run(cfg, ranks)
    return cfg, ranks


def check_files(cfg: Config) -> None:
    """Refuse what is not there before any rank starts."""
    files = {"data.train": cfg.data.train, "data.eval": cfg.data.eval, "sft.data": cfg.sft.data}
    for name, path in files.items():
        if path is not None and not Path(path).is_file():
            where = "" if Path(path).is_absolute() else f" in {Path.cwd()}"
            what = "a directory, not a file" if Path(path).is_dir() else "no such file"
            raise ConfigError(f"{name}={path}: {what}{where}")


def world_size(parallel: config.sections.ParallelConfig, nproc: int | None) -> int:
    """How many ranks there will be: as torchrun or srun says, as was asked for, or as few as the layout needs."""
    if launch.is_rank():
        return int(os.environ["WORLD_SIZE"])
    if nproc is not None and nproc < 1:
        raise ConfigError(f"--nproc {nproc}: give at least one rank")
    return nproc or layout.fewest_ranks(parallel)


def on_ranks(
    command: str,
    argv: list[str],
    nproc: int,
    parallels: Sequence[config.sections.ParallelConfig],
    run_dir: Path | None = None,
) -> int | None:
    """Start the ranks and return their exit code; None in a process that is (or may itself be) the only rank.

    `parallels`: the layouts that they will take. SIGTERM, or Ctrl-C, asks the ranks in `run_dir` to stop between two
    steps. ConfigError: they do not fit on this machine.
    """
    is_rank = launch.is_rank()
    here = launch.place()
    who = f"{here.host} attempt {here.attempt}{f' rank {here.rank}' if is_rank else ''}"
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {who} %(levelname)s %(name)s: %(message)s")
    if is_rank:
        launch.die_with_parent()
        return None
    if nproc == 1:
        return None
    launch.check_room(command, nproc, _asked_by(nproc, parallels))
    if run_dir is None:
        return launch.run(command, argv, nproc)
    lock.refuse_held(run_dir, here)  # again by rank 0, for all that it writes
    code = launch.run(command, argv, nproc, partial(ask_to_stop, run_dir))
    if code and (latest := run_dir / "checkpoints" / "latest").exists():
        print(f"the same command continues from {latest.with_name(latest.read_text().strip())}", file=sys.stderr)
    return code


def _asked_by(nproc: int, parallels: Sequence[config.sections.ParallelConfig]) -> str:
    """The settings that made it so many ranks."""
    if nproc != math.lcm(*map(layout.fewest_ranks, parallels)):
        return f"--nproc {nproc}"
    cuts = [(name, size) for p in parallels for name, size in p.model_dump(exclude={"vpp"}).items() if size > 1]
    return ", ".join(dict.fromkeys(f"parallel.{name}={size}" for name, size in cuts))


def ask_to_stop(run_dir: Path) -> None:
    """Make RUN/stop for the ranks of this attempt, whether they look already or have yet to start."""
    with placed(run_dir / "stop") as unfinished:
        unfinished.write_text(f"{STOP_FOR}{launch.attempt()}\n")


def refuse_other_command(command: str, cfg: Config) -> None:
    """One run directory belongs to one command: its checkpoints and `done` mean nothing to another."""
    pointer = cfg.run_dir / "checkpoints" / "latest"
    marks = [cfg.run_dir / "done"]
    if pointer.exists():
        marks.append(pointer.parent / pointer.read_text().strip() / "megasapo.json")
    for mark in marks:
        try:
            record = json.loads(mark.read_text()) if mark.exists() else {}
        except ValueError:  # damaged: mcore.checkpoint sets it aside
            continue
        owner = record.get("trainer", record).get("command", command)
        if owner != command:
            raise ConfigError(f"{cfg.run_dir} belongs to `megasapo {owner}`: choose another run.name for {command}")


def finished(cfg: Config) -> bool:
    """Whether `megasapo train` has taken all steps that are asked for now."""
    done = cfg.run_dir / "done"
    return done.exists() and int(jsonl.parse(done.read_bytes(), done)["step"]) >= cfg.train.steps


def join(cfg: Config, cleanup: ExitStack) -> tuple[Topology, Heartbeat, RunDir]:
    """Take the run directory and meet the other ranks, until `cleanup` gives both back. Collective."""
    from megasapo.log.heartbeat import Heartbeat
    from megasapo.mcore.topology import Topology

    cleanup.enter_context(lock.hold(cfg.run_dir, launch.place()))
    heartbeat = cleanup.enter_context(Heartbeat(cfg.run_dir, launch.place()))
    with heartbeat.phase("join"):
        topo = Topology.init(cfg.parallel, seed=cfg.run.seed, rows=cfg.precision.rows)
    cleanup.callback(topo.destroy)
    return topo, heartbeat, RunDir(cfg, is_main=topo.rank == 0, signalled=launch.stop_flag())


class RunDir:
    """The directory of one run; README.md says what is where."""

    def __init__(self, cfg: Config, *, is_main: bool, signalled: Callable[[], bool] = lambda: False):
        """`signalled`: whether this process was asked to stop."""
        self.path = cfg.run_dir
        self._is_main, self._signalled = is_main, signalled
        if is_main:
            for name in ("logs", "checkpoints", "rollouts"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self._save_config(cfg)
            if not self._stop_is_ours():
                (self.path / "stop").unlink(missing_ok=True)  # somebody asked an earlier run

    def resumed(self, checkpoint: Path | None, *, finished: bool) -> None:
        """Say where the run goes on, and that it is not done where train.steps was raised since."""
        if self._is_main and checkpoint is not None:
            print(f"continues from {checkpoint}", flush=True)
            if not finished:
                (self.path / "done").unlink(missing_ok=True)

    def finish(self, command: str, step: int) -> None:
        """Write `done`: the run has ended by itself."""
        if self._is_main:
            checkpoints.write_durably(self.path / "done", json.dumps({"command": command, "step": step}))

    def report_end(self, step: int, total: int, hf: Path) -> None:
        """Say, once the ranks have parted, how it ended and where everything is; `hf`: what is made at the very end."""
        if not self._is_main:
            return
        ended = "finished" if step >= total else f"stopped after step {step} of {total}; run it again to continue"
        print(f"\n{self.path} {ended}\n  TensorBoard  tensorboard --logdir {self.path / 'tensorboard'}")
        print(f"  metrics      {self.path / 'metrics.jsonl'}\n  checkpoints  {self.path / 'checkpoints'}")
        if step >= total:
            print(f"  HF model     {hf}")
        sys.stdout.flush()

    def _save_config(self, cfg: Config) -> None:
        path = self.path / "config.yaml"
        if path.exists() and (self.path / "checkpoints" / "latest").exists():  # else nothing of it is continued
            for line in _changes(path, cfg):
                print(f"{self.path}: {line}", flush=True)
        config.save(cfg, path)

    def stop_requested(self) -> bool:
        """A signal, or the file RUN/stop that someone made for whichever ranks there are or for these."""
        asked = self._stop_file()
        by_file = asked is not None and (not asked.startswith(STOP_FOR) or self._stop_is_ours())
        return by_file or self._signalled()

    def _stop_is_ours(self) -> bool:
        return self._stop_file() == f"{STOP_FOR}{launch.attempt()}"

    def _stop_file(self) -> str | None:
        try:
            return (self.path / "stop").read_text().strip()
        except FileNotFoundError:
            return None


def _changes(path: Path, cfg: Config) -> list[str]:
    """What to say of the configuration that was saved at `path`: what `cfg` changes, or that it is lost."""
    try:
        before = config.read(path)
    except ConfigError as e:
        return [f"what changed since the run began cannot be told, {path.name} is written anew: {e}"]
    if not before:
        return [f"what changed since the run began cannot be told: {path.name} is empty, as after a loss of power"]
    changed = config.differences(before, cfg.model_dump(mode="json"))
    return [f"setting changed since the run began: {line}" for line in changed]


class Phases:
    """Seconds spent in each named phase of one step; `take` returns them and starts over.

    Each phase runs inside every `around(name)`: log.heartbeat.Heartbeat.phase, log.profile.Profiler.phase.
    """

    def __init__(self, *around: Callable[[str], AbstractContextManager[object]]) -> None:
        self._around = around
        self._seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        with ExitStack() as inside:
            for around in self._around:
                inside.enter_context(around(name))
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - before

    def take(self) -> dict[str, float]:
        """{"time/<phase>_s": seconds}, and of the whole step "time/step_s"."""
        now = time.perf_counter()
        whole, self._started = now - self._started, now
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}_s": s for name, s in seconds.items()} | {"time/step_s": whole}
