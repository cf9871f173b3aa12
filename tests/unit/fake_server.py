"""A rollout server process without a model, started in a tenth of a second: for tests of processes, not of answers.

usage: fake_server.py PORT [--crash] [--never-healthy] [--stuck-by FILE] [--refuse-updates] [--child PID_FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    version = "default"

    def do_GET(self) -> None:
        if self.path.startswith("/health"):
            stuck = "--stuck-by" in sys.argv and Path(sys.argv[sys.argv.index("--stuck-by") + 1]).exists()
            return self._reply(503 if stuck or "--never-healthy" in sys.argv else 200, {})
        self._reply(200, {"weight_version": Handler.version})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path == "/update_weights_from_disk":
            if "--refuse-updates" in sys.argv:
                return self._reply(400, {"success": False, "message": "scripted refusal"})
            Handler.version = body["weight_version"]
        if self.path == "/generate":
            return self._reply(200, [self._answer() for _ in body["input_ids"]])
        self._reply(200, {"success": True})

    def _answer(self) -> dict[str, object]:
        meta = {"finish_reason": {"type": "length"}, "weight_version": Handler.version}
        return {"output_ids": [1], "meta_info": {**meta, "output_token_logprobs": [[-1.0, 1, None]]}}

    def _reply(self, status: int, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    print("fake server on port", sys.argv[1], flush=True)
    if "--crash" in sys.argv:
        raise SystemExit("fake server: scripted crash")
    if "--child" in sys.argv:  # as SGLang's scheduler: a process of its own that does not watch its parent
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(sys.argv[sys.argv.index("--child") + 1]).write_text(str(child.pid))
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.daemon_threads = True
    server.serve_forever(poll_interval=0.05)
