"""A brake for the servers of tests: while a certain file is there, each step of a long request takes a while longer.

What a test does to a running request then never comes too late, however busy the machine or fast the server is.
MEGASAPO_BRAKE names the file; FILE.felt says that a long request runs and has at least a token. sgl_cpu_plugin.py
brings it into SGLang; `brake.py FLAGS` is the embedded server with it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VARIABLE = "MEGASAPO_BRAKE"
STEP_S = 0.1
LONG_TOKENS = 1000  # health checks, which come at any time, ask for one


def felt_at(file: Path) -> Path:
    return file.with_name(f"{file.name}.felt")


def brake(max_new_tokens: Iterable[int]) -> None:
    """After a step of requests for so many tokens."""
    file = Path(os.environ[VARIABLE])
    if file.exists() and max(max_new_tokens, default=0) >= LONG_TOKENS:
        felt_at(file).touch()
        time.sleep(STEP_S)


def install_in_sglang() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def after_step(result: Any, scheduler: Any, batch: Any, *_: Any) -> None:
        brake(request.sampling_params.max_new_tokens for request in batch.reqs)

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.process_batch_result", after_step, HookType.AFTER)


def embedded() -> int:
    from megasapo.rollout.local import main
    from megasapo.rollout.local.engine import Engine

    step = Engine._step

    def braked(self: Engine) -> None:
        step(self)
        brake(sequence.sampling.max_new_tokens for sequence in self.batch.rows)

    Engine._step = braked  # type: ignore[method-assign]
    return main()


if __name__ == "__main__":
    sys.exit(embedded())
