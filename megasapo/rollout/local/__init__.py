"""The embedded rollout server: `megasapo serve`, SGLang's HTTP protocol on transformers' model code.

Started by the fleet (`python -m megasapo.rollout.local`) or by hand. It must not know the learner or megatron.
Importing it does not import torch, so that `--help` answers at once.
"""

from __future__ import annotations

import socket
import sys
from dataclasses import replace

from megasapo.errors import UserError
from megasapo.rollout.local.options import parse


def main(argv: list[str] | None = None) -> int:
    """`megasapo serve`; returns the exit code."""
    options = parse(argv)
    listener = _bind(options.host, options.port)  # before anything slow: a port in use is reported at once
    from megasapo.rollout.local.server import serve

    try:
        return serve(replace(options, port=listener.getsockname()[1]), listener)
    except UserError as e:  # also where the fleet starts this package without the `megasapo` command
        print(f"megasapo serve: {e}", file=sys.stderr)
        return 2


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that nobody connects before the model is there."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as e:
        raise SystemExit(f"megasapo serve: cannot listen on {host}:{port}: {e}") from e
    return bound
