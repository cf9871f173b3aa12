"""A reward for runs that have to stand still at a known step, and a server that only says it is well."""

from __future__ import annotations

import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any


def digit(prompt: Any, response: str, run: str) -> float:
    """1 for a response with a digit. While a file RUN.gate holds a number, no step after that one is graded.

    Who waits there says so in a file RUN.stands.JOB.ATTEMPT.
    """
    gate, metrics = Path(f"{run}.gate"), Path(run) / "metrics.jsonl"
    while gate.exists() and metrics.exists() and metrics.read_bytes().count(b"\n") >= int(gate.read_text()):
        Path(f"{run}.stands.{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}").touch()
        time.sleep(0.1)
    return float(any(c.isdigit() for c in response))


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


if __name__ == "__main__":
    HTTPServer(("0.0.0.0", int(sys.argv[1])), Healthy).serve_forever()
