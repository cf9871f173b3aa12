"""Starts a test module again as N ranks, waits, and fails with the output of the rank that failed first."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000  # characters of a rank's output shown


def run_ranks(
    world_size: int, module: str, *args: str, logs: Path, timeout_s: float = 240, env: dict[str, str] | None = None
) -> list[str]:
    """Run `python -m MODULE ARGS` as `world_size` local ranks; the output (stdout and stderr) of each rank.

    Nothing is left running: once a rank fails, or at `timeout_s`, the others are killed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = str(free_ports(1)[0])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    outputs = [logs / f"rank{rank}.log" for rank in range(world_size)]
    ranks: list[subprocess.Popen[bytes]] = []
    failed: int | None = None
    deadline = time.monotonic() + timeout_s
    try:
        for rank, output in enumerate(outputs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with output.open("wb") as f:
                command = [sys.executable, "-m", module, *args]
                environment = os.environ | shared | own | (env or {})
                ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=f, stderr=subprocess.STDOUT))
        while failed is None and any(p.poll() is None for p in ranks) and time.monotonic() < deadline:
            failed = next((rank for rank, p in enumerate(ranks) if p.poll()), None)
            time.sleep(0.05)
        codes = [p.poll() for p in ranks]  # None: still running
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    texts = [output.read_text(errors="replace") for output in outputs]
    failed = next((rank for rank, code in enumerate(codes) if code), None) if failed is None else failed
    if failed is not None:
        raise AssertionError(f"rank {failed} of {world_size} exited with {codes[failed]}:\n{texts[failed][-TAIL:]}")
    if any(code is None for code in codes):
        everything = "\n".join(f"--- rank {rank} ({codes[rank]}):\n{t[-TAIL // 2 :]}" for rank, t in enumerate(texts))
        raise AssertionError(f"{world_size} ranks were not done after {timeout_s} s\n{everything}")
    return texts


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, outside the range from which Linux takes the ports of outgoing connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as s:
            if port not in ports and s.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports
