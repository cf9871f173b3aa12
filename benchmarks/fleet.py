"""What the client side of the rollout fleet costs: thousands of requests in flight from one process.

Servers are stand-ins (tests/unit/load_server.py) that answer at a set speed over loopback, so that all time beyond
`ideal` is the client's, or waiting for a core. `ideal` is what a client that takes no time would need for the same
requests, computed from their lengths. Every answer is checked: none lost, doubled or another's. The stand-ins take CPU
time too, on the same machine; `client CPU` is of this process alone.

    python -m benchmarks.fleet [--servers 1 8 64] [--in-flight 256] [--rounds 2] [--tokens-per-s 10]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.measure import machine, table
from megasapo.rollout.fleet import Fleet
from megasapo.sections import RolloutConfig
from tests.unit.load import Servers, check, ideal_s, model, requests, serving

PORTS = 16  # of one stand-in process
GROUP = 8


def measure(servers: int, args: argparse.Namespace, directory: Path) -> list[str]:
    """One row of the table."""
    in_flight = servers * args.in_flight
    prompts, sampling = requests(args.rounds * in_flight, args.shortest, args.longest, group=GROUP)
    speed = f"--tokens-per-s={args.tokens_per_s}"
    groups = [Servers(speed, ports=min(PORTS, servers - i)) for i in range(0, servers, PORTS)]
    with serving(*groups) as urls:
        cfg = RolloutConfig(servers=tuple(urls), deterministic=False, max_in_flight=in_flight, request_timeout_s=3600.0)
        with Fleet.start(cfg, model(directory / "model"), directory) as fleet:
            fleet.version = 7
            process = psutil.Process()
            rss, cpu, start = process.memory_info().rss, time.process_time(), time.perf_counter()

            async def run() -> tuple[float, float]:
                completions = await fleet.generate(prompts, sampling)
                took = time.perf_counter() - start, time.process_time() - cpu
                check(completions, prompts, sampling)
                await fleet.close()
                return took

            wall_s, cpu_s = asyncio.run(run())
            retries = fleet.take_metrics().get("rollout/retries")
    ideal = ideal_s(sampling, in_flight, args.tokens_per_s)
    tokens = sum(s.max_new_tokens for s in sampling)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - rss
    return [
        f"{servers}",
        f"{in_flight:,}",
        f"{len(prompts):,}",
        f"{tokens / wall_s:,.0f}",
        f"{wall_s:.1f}",
        f"{ideal:.1f}",
        f"{100 * (wall_s - ideal) / wall_s:.1f} %",
        f"{cpu_s:.1f} ({100 * cpu_s / wall_s:.0f} %)",
        f"{1e3 * cpu_s / len(prompts):.2f}",
        f"{peak / 1e6:.0f}",
        f"{retries.value() if retries else 0:.0f}",
    ]


HEADER = (
    *("servers", "in flight", "requests", "tokens/s", "wall s", "ideal s", "client overhead", "client CPU s"),
    *("CPU ms a request", "memory MB", "retries"),
)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--servers", type=int, nargs="+", default=[1, 8, 64])
    p.add_argument("--in-flight", type=int, default=256, help="requests at a server")
    p.add_argument("--rounds", type=int, default=2, help="requests for each that may be in flight")
    p.add_argument("--shortest", type=int, default=64, help="tokens of a response")
    p.add_argument("--longest", type=int, default=1024)
    p.add_argument("--tokens-per-s", type=float, default=10.0, help="of one request")
    p.add_argument("--row", type=int, help=argparse.SUPPRESS)  # one row, in a process of its own
    args = p.parse_args()
    if args.row is not None:
        with tempfile.TemporaryDirectory() as directory:
            print("\t".join(measure(args.row, args, Path(directory))))
        return
    rows = []
    for servers in args.servers:  # each in a process of its own, for its memory
        command = [sys.executable, "-m", "benchmarks.fleet", *sys.argv[1:], "--row", str(servers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        with contextlib.suppress(IndexError):
            rows.append(done.stdout.strip().splitlines()[-1].split("\t"))
        done.check_returncode()
    print(machine("aiohttp", "orjson"))
    print(
        f"responses of {args.shortest} to {args.longest} tokens at {args.tokens_per_s:g} tokens/s each, "
        f"prompts of 100, groups of {GROUP}\n"
    )
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
