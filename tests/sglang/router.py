"""A real sglang-router, started as an operator would, in front of servers that ask for a key."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.dist.launcher import free_ports
from tests.sglang.conftest import sglang_python

START_S = 300.0


@contextmanager
def routing(workers: Sequence[str], key: str, log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """The URL of a router that knows all `workers`, until the end of the block. `options`: more of its own."""
    if not sglang_python().exists():
        pytest.fail(f"no SGLang environment at {sglang_python()}: run tests/sglang/setup.sh, or pytest -m 'not sglang'")
    port, prometheus_port = free_ports(2)  # it takes them seconds later
    command = [str(sglang_python()), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    # its default policy keeps prompts with a common beginning at one server until that is 64 requests ahead
    command += ["--policy", "round_robin", "--log-level", "warn"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(prometheus_port), *options]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0, trust_env=False) as http:
                _introduce(http, workers, key, process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _introduce(
    http: httpx.Client, workers: Sequence[str], key: str, process: subprocess.Popen[bytes], log: Path
) -> None:
    deadline, missing = time.monotonic() + START_S, set(workers)
    while missing:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            known = {w["url"]: w["is_healthy"] for w in http.get("/workers").json()["workers"]}
            for url in missing - known.keys():
                http.post("/workers", json={"url": url, "api_key": key})
            missing -= {url for url, healthy in known.items() if healthy}
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.2)
