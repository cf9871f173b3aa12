"""One-step-off rollouts (rollout.max_staleness=1) against synchronous ones, on the arithmetic example.

Whole runs of examples/arithmetic/sapo.yaml from its cold start (`make train` makes it), --seeds of each kind, taking
turns so that a busy machine slows both. Requests mix freely in both (rollout.deterministic=false).

--slow-server S puts a proxy in front of the run's server that holds every answer back until S seconds after it was
asked for: what a rollout server on other hardware looks like from here, whose time costs the learner no core. Without
it, learner and server share this machine's cores.

    python -m benchmarks.async_rollouts [--steps 20] [--seeds 3] [--slow-server 1.0] [--nproc 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from benchmarks import measure
from megasapo.rollout.spawn import free_port

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "arithmetic"
KINDS = {
    "synchronous": ("rollout.deterministic=false",),
    "one step off": ("rollout.deterministic=false", "rollout.max_staleness=1"),
}
LAST = 10  # steps that the final reward is the mean of


class Slow:
    """A server's port that answers `/generate` no sooner than so many seconds after the question."""

    def __init__(self, target: str, seconds: float) -> None:
        client = httpx.Client(base_url=target, timeout=600, trust_env=False)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                asked = time.monotonic()
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = client.request(
                    self.command, self.path, content=body, headers={"Content-Type": "application/json"}
                )
                if self.path == "/generate":
                    time.sleep(max(0.0, asked + seconds - time.monotonic()))
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_POST = _pass_on

            def log_message(self, *_: object) -> None:
                """Quietly."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 1024
            daemon_threads = True

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()


def run(kind: str, seed: int, directory: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """The metrics of a run's steps."""
    name = f"{list(KINDS).index(kind)}-{seed}"
    settings = [
        *(f"run.name={name}", f"run.dir={directory}", f"run.seed={seed}", *KINDS[kind]),
        *(f"model.path={args.task / 'cold-start'}", f"data.train={args.task / 'train.jsonl'}", "data.eval=null"),
        *(f"train.steps={args.steps}", f"train.save_every={args.steps}", "train.eval_every=0", "parallel.ep=1"),
        *("log.sinks=[jsonl]", "log.keep_rollouts=false"),
    ]
    with (directory / f"{name}.log").open("w") as log:
        if args.slow_server:
            port = free_port()
            model = str(args.task / "cold-start")
            serve = [sys.executable, "-m", "megasapo.cli", "serve", "--model", model, "--port", str(port)]
            server = subprocess.Popen(serve, stdout=log, stderr=log, cwd=ROOT)
            slow = Slow(f"http://127.0.0.1:{port}", args.slow_server)
            settings.append(f"rollout.servers=[{slow.url}]")
            _wait_for(f"http://127.0.0.1:{port}", server)
        command = [sys.executable, "-m", "megasapo.cli", "train", str(EXAMPLE / "sapo.yaml"), *settings]
        try:
            code = subprocess.run([*command, "--nproc", str(args.nproc)], stdout=log, stderr=log, cwd=ROOT).returncode
        finally:
            if args.slow_server:
                slow.close()
                server.terminate()
                server.wait()
    if code:
        sys.exit(f"{kind}, seed {seed}: exit code {code}:\n{(directory / f'{name}.log').read_text()[-3000:]}")
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=30, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    sys.exit(f"the server ended with exit code {server.returncode}")


def step_s(row: dict[str, float]) -> float:
    return row["time/step_s"]


def final_reward(rows: list[dict[str, float]]) -> float:
    return statistics.mean(row["reward/mean"] for row in rows[-LAST:])


def table_rows(seen: dict[str, list[list[dict[str, float]]]]) -> list[tuple[str, ...]]:
    """A row for each kind: reward of every seed, mean and standard deviation, seconds a step, ratio to synchronous."""
    clock = {kind: [statistics.median(map(step_s, rows[2:])) for rows in runs] for kind, runs in seen.items()}
    found = []
    for kind, runs in seen.items():
        rewards = [final_reward(rows) for rows in runs]
        waits = statistics.median(statistics.median(r["time/rollout_s"] for r in rows[2:]) for rows in runs)
        ratio = statistics.median(s / own for s, own in zip(clock["synchronous"], clock[kind], strict=True))
        stale = statistics.mean(row["staleness/mean"] for rows in runs for row in rows)
        found.append((
            kind, ", ".join(f"{r:.3f}" for r in rewards), f"{statistics.mean(rewards):.3f}",
            f"{statistics.stdev(rewards):.3f}", f"{stale:.2f}", f"{statistics.median(clock[kind]):.2f}",
            f"{waits:.2f}", f"{ratio:.2f}",
        ))  # fmt: skip
    return found


HEADER = (
    "rollouts", f"reward of the last {LAST} steps, by seed", "mean", "std", "staleness", "s a step (median)",
    "of it waiting for rollouts", "speed-up over synchronous",
)  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", type=Path, default=EXAMPLE / "out", help="the example's directory, with cold-start/")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--nproc", type=int, default=1)
    p.add_argument("--slow-server", type=float, default=0.0, metavar="S")
    args = p.parse_args()
    args.task = args.task.resolve()
    if not (args.task / "cold-start" / "config.json").exists():
        p.error(f"{args.task} has no cold-start/: `make train` makes it, or give --task")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seen: dict[str, list[list[dict[str, float]]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(1, 1 + args.seeds):
            for kind, runs in seen.items():
                runs.append(run(kind, seed, Path(directory), args))
                print(f"{kind}, seed {seed}: {final_reward(runs[-1]):.3f}", file=sys.stderr, flush=True)
    print(measure.machine("megatron-core"))
    print(f"{args.steps} steps, {args.nproc} rank(s), server held back to {args.slow_server:g} s a request\n")
    print(measure.table(HEADER, table_rows(seen)))


if __name__ == "__main__":
    main()
