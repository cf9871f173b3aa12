"""The embedded rollout server: `megasapo serve`, SGLang's HTTP protocol on transformers' model code.

Started by the fleet (`python -m megasapo.rollout.local`) or by hand. It must not know the learner or megatron.
Importing it does not import torch, so that `--help` answers at once.
"""

from __future__ import annotations

from megasapo.rollout.local.options import parse


def main(argv: list[str] | None = None) -> int:
    """`megasapo serve`; returns the exit code."""
    options = parse(argv)
    from megasapo.rollout.local.server import serve

    return serve(options)
