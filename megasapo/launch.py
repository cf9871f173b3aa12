"""Starts a command on N local ranks, or joins those that torchrun or srun already started.

Called by the commands that use the learner. Local ranks are started by torchrun's launcher; this module ties the life
of a rank to its parent and turns SIGTERM and Ctrl-C into a flag that the training loop reads between two steps.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megasapo.config import ConfigError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHER = "MEGASAPO_LAUNCHER_PID"  # set for the ranks that `run` starts


def is_rank() -> bool:
    """True inside a process that torchrun or srun started as a rank; srun's variables are translated to torchrun's.

    Raises ConfigError under srun without MASTER_ADDR and MASTER_PORT: only the batch script knows the first node.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and int(tasks) > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(f"under srun with {tasks} tasks: export {' and '.join(missing)} of rank 0's node first")
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["WORLD_SIZE"] = tasks
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs: its rank, and which attempt of which job on which machine that is."""

    host: str
    rank: int
    world_size: int
    job: str  # Slurm's number, empty without Slurm
    attempt: int  # how often Slurm has requeued the job


def place() -> Place:
    """That of this process; call `is_rank` before, which translates srun's variables."""
    env = os.environ
    return Place(
        host=socket.gethostname(),
        rank=int(env.get("RANK", "0")),
        world_size=int(env.get("WORLD_SIZE", "1")),
        job=env.get("SLURM_JOB_ID", ""),
        attempt=int(env.get("SLURM_RESTART_COUNT", "0")),
    )


def attempt() -> str:
    """What tells this start of a run's ranks from earlier and later ones, equal on all; empty: nothing does.

    The local launcher's pid, or Slurm's job with the count of its restarts.
    """
    job = os.environ.get("SLURM_JOB_ID")
    return os.environ.get(LAUNCHER) or (f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else "")


def visible_device(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls device `index` of this process: a number, a UUID, or nothing (empty)."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return names[index].strip() if index < len(names) else ""


def torch_temporary() -> str:
    """Where torch makes its sockets: Python would take the first of these directories that it can write to."""
    return next(filter(None, map(os.environ.get, ("TMPDIR", "TMP", "TEMP", "TEMPDIR"))), "/tmp")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_room(command: str, nproc: int, asked_by: str) -> None:
    """Refuse more ranks than this machine has GPUs (ConfigError); without GPUs, say so where there are more than cores.

    `asked_by`: the setting that made it so many.
    """
    import torch

    gpus = torch.cuda.device_count()
    if gpus and nproc > gpus:
        raise ConfigError(
            f"{nproc} ranks ({asked_by}) need a GPU each, and there are {gpus} here: ask for fewer, or start them on "
            "several machines with torchrun or srun"
        )
    if not gpus and nproc > cores():
        print(
            f"megasapo {command}: {nproc} ranks ({asked_by}) will take turns on the {cores()} cores here, which is "
            "slow, and each needs memory of its own",
            file=sys.stderr,
            flush=True,
        )


def run(command: str, argv: list[str], nproc: int, on_term: Callable[[], None] | None = None) -> int:
    """Run `megasapo COMMAND ARGV` on `nproc` local ranks, as torchrun would; 0, or 1 when a rank failed.

    The first rank to fail is named; its own message is in the output above. `on_term` answers SIGTERM and the first
    Ctrl-C: it asks the ranks to stop in their own time, where the launcher itself would kill them 30 s later.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Two ranks that each start a thread per core fight for them: measured slower than one thread a rank.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[LAUNCHER] = str(os.getpid())
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what it would say is said below
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    if on_term is not None and hasattr(config, "signals_to_handle"):  # torch < 2.10 has only the 30 s
        config.signals_to_handle = "SIGHUP,SIGQUIT"
        signal.signal(signal.SIGTERM, lambda *_: on_term())

        def end_ranks(number: int, _frame: object) -> None:
            raise SignalException(f"signal {number}", sigval=signal.Signals(number))

        on_first_interrupt(on_term, end_ranks)
    try:
        elastic_launch(config, sys.executable)("-m", "megasapo.cli", command, *argv)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        killed = failure.exitcode < 0
        how = f"was killed by {_signal(-failure.exitcode)}" if killed else "failed; its own message is above"
        print(f"megasapo {command}: rank {rank} of {nproc} {how}", file=sys.stderr)
        return 1
    except SignalException as e:
        print(f"megasapo {command}: stopped by signal {int(e.sigval)}", file=sys.stderr)
        return 128 + int(e.sigval)
    finally:
        del os.environ[LAUNCHER]
    return 0


def _signal(number: int) -> str:
    hint = ", as Linux does when memory runs out" if number == signal.SIGKILL else ""
    return f"{signal.Signals(number).name}{hint}"


def freeze_heap() -> None:
    """Once all is set up: garbage collections need not walk again through what imports and the model left behind.

    A full one stops every thread of a learner for 0.17 s, and the thread that writes a checkpoint sets them off.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries find their objects alive at the very end, and print them (nanobind)


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies: torchrun killed by -9 must not leave its ranks behind.

    Exits at once where our own launcher has died already: such a rank would wait for the others for hours.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and os.getppid() != int(launcher):
        sys.exit(f"the launcher, process {launcher}, is gone")


class StopFlag:
    """Whether SIGTERM, SIGUSR1 or Ctrl-C has arrived: called, it says so."""

    def __init__(self) -> None:
        self._received: list[int] = []

    def remember(self, number: int, _frame: object) -> None:
        self._received.append(number)

    def __call__(self) -> bool:
        return bool(self._received)

    def has_received(self, number: int) -> bool:
        """Whether this very signal has arrived."""
        return number in self._received


def stop_flag() -> StopFlag:
    """Install the handlers: for the first Ctrl-C where there is no launcher, which answers it."""
    flag = StopFlag()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, flag.remember)
    if not is_rank():
        on_first_interrupt(lambda: flag.remember(signal.SIGINT, None), signal.default_int_handler)
    return flag


def on_first_interrupt(stop: Callable[[], None], again: Callable[[int, Any], None]) -> None:
    """Ctrl-C calls `stop` and says so; once more, `again`. Where it is ignored (a script's background) it stays so."""

    def interrupted(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, again)
        os.write(2, b"\nstops after this step, with a checkpoint; Ctrl-C again: at once\n")  # print is not reentrant
        stop()

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)
