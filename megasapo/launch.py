"""Starts a command on N local ranks, or joins the ranks that torchrun or srun already started.

Called by the commands that use the learner. Local ranks are torchrun's; this module only builds its command line, ties
the life of a rank to its parent and turns SIGTERM into a flag that the training loop reads between two steps.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def is_rank() -> bool:
    """True inside a process that torchrun or srun started as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run(command: str, argv: list[str], nproc: int) -> int:
    """Run `megasapo COMMAND ARGV` on `nproc` local ranks under torchrun; the exit code is torchrun's (0 or 1)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    env = dict(os.environ)
    # Two ranks that each start a thread per core fight for them: measured slower than one thread a rank.
    env.setdefault("OMP_NUM_THREADS", "1")
    child = subprocess.Popen([*torchrun, "-m", "megasapo.cli", command, *argv], env=env)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: child.send_signal(received))
    return child.wait()


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies: torchrun killed by -9 must not leave its ranks behind."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop_flag() -> Callable[[], bool]:
    """Install handlers for SIGTERM and SIGUSR1; the returned function says whether one has arrived."""
    received: list[int] = []

    def remember(number: int, _frame: object) -> None:
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, remember)
    return lambda: bool(received)
