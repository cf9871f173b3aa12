"""Starts a test module again as N ranks, waits, and fails with the output of the rank that failed first.

Ranks are forked from a server process that has imported what they all need: a rank that imports torch, transformers
and megatron-core by itself needs five to eight seconds of CPU before its test begins.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import socket
import sys
import time
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000  # characters of a rank's output shown


def run_ranks(
    world_size: int, module: str, *args: str, logs: Path, timeout_s: float = 900, env: dict[str, str] | None = None
) -> list[str]:
    """Run `python -m MODULE ARGS` as `world_size` local ranks; the output (stdout and stderr) of each rank.

    Nothing is left running: once a rank fails, or at `timeout_s`, the others are killed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": str(world_size)}
    outputs = [logs / f"rank{rank}.log" for rank in range(world_size)]
    ranks = []
    failed: int | None = None
    deadline = time.monotonic() + timeout_s
    try:
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(_server().Process(target=_rank, args=(module, args, shared | own | (env or {}), output)))
            ranks[-1].start()
        while failed is None and any(p.is_alive() for p in ranks) and time.monotonic() < deadline:
            failed = next((rank for rank, p in enumerate(ranks) if p.exitcode), None)
            time.sleep(0.05)
        codes = [p.exitcode for p in ranks]  # None: still running
    finally:
        for process in ranks:
            process.kill()
            process.join()
    texts = [output.read_text(errors="replace") if output.exists() else "" for output in outputs]
    failed = next((rank for rank, code in enumerate(codes) if code), None) if failed is None else failed
    if failed is not None:
        raise AssertionError(f"rank {failed} of {world_size} exited with {codes[failed]}:\n{texts[failed][-TAIL:]}")
    if any(code is None for code in codes):
        everything = "\n".join(f"--- rank {rank} ({codes[rank]}):\n{t[-TAIL // 2 :]}" for rank, t in enumerate(texts))
        raise AssertionError(f"{world_size} ranks were not done after {timeout_s} s\n{everything}")
    return texts


def start_alone(module: str, *args: str, output: Path) -> ForkServerProcess:
    """Run `python -m MODULE ARGS` as a process of one rank; who starts it kills it. What it prints goes to `output`."""
    process = _server().Process(target=_rank, args=(module, args, {}, output))
    process.start()
    return process


@cache
def _server() -> ForkServerContext:
    """The server that ranks are forked from, one for this process: started at the first call, ends with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist.preload"])
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):  # torch reads it once, when it is imported
        forkserver.ensure_running()
    return context


def _rank(module: str, args: tuple[str, ...], env: dict[str, str], output: Path) -> None:
    """A rank's whole life, in a process of its own."""
    with output.open("wb") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    os.environ.update(env | {"OMP_NUM_THREADS": "1"})
    os.chdir(ROOT)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _range_of_ports() -> range:
    """Outside the range from which Linux takes the ports of outgoing connections; each of xdist's workers has its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    return range(10_000 + 2_200 * worker, 10_000 + 2_200 * (worker + 1))


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.choice(_range_of_ports())
        with socket.socket() as s:
            if port not in ports and s.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports
