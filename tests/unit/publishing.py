"""Publishing a tiny model to embedded servers, and asking them: shared by tests/unit/test_publish*.py."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megasapo.publish import Bucket, Publisher
from megasapo.rollout.fleet import Fleet
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams
from tests.asking import ask

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [(5, 6, 7), (300, 41)]
TIMEOUT_S = 300.0  # of what hangs
ONLINE = pytest.mark.parametrize("method", ["distributed", "tensor"])


def older() -> RolloutConfig:
    """A server without update sessions."""
    script = str(Path(__file__).with_name("older_server.py"))
    command = (sys.executable, script, "--model", "{model}", "--port", "{port}")
    return RolloutConfig(engine="sglang", spawn_command=command, start_timeout_s=TIMEOUT_S, deterministic=False)


def export_of(directory: Path, per_bucket: int = 20) -> Iterator[Bucket]:
    tensors = list(load_file(directory / "model.safetensors").items())
    for i in range(0, len(tensors), per_bucket):
        yield tensors[i : i + per_bucket]


def publisher(fleet: Fleet, source: Path, dirs: list[Path], run_dir: Path, method: Any, **over: Any) -> Publisher:
    return Publisher(
        over.pop("export", lambda: export_of(source)),
        fleet,
        RolloutConfig(publish=method, start_timeout_s=TIMEOUT_S, publish_changed_only=over.pop("changed_only", False)),
        rank=0,
        agree=lambda x: x,
        run_dir=run_dir,
        model_dir=dirs[0],
        verify=over.pop("verify", True),
    )


def generate(fleet: Fleet) -> list[Completion]:
    return ask(fleet, PROMPTS, GREEDY)


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [c.output_ids for c in completions]


def greedy_by_transformers(directory: Path) -> list[tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        ids = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
        out.append(tuple(ids[0, len(prompt) :].tolist()))
    return out


def memory_in_use() -> set[Path]:
    """What this process shares by name."""
    return set(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
