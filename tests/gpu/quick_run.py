"""A short reinforcement-learning run as a process of its own, on any device, and what must hold of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.e2e.runs import metrics, running, write_config

STEPS = 5


def quick_run(model: Path, directory: Path, *, device: str, **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Metrics of a run of a few steps with R3: the learner is where torch finds a GPU, the server on `device`."""
    problems = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (directory / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    settings: dict[str, Any] = {
        "run": {"name": "run", "dir": str(directory)},
        "model": {"path": str(model), "dtype": "bfloat16"},
        "data": {"train": str(directory / "train.jsonl"), "max_prompt_tokens": 16},
        "reward": {"rewards": [{"name": "format", "options": {"pattern": ".*[0-9].*"}}]},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 4,
            "max_new_tokens": 12,
            "server_args": ["--device", device],
            "publish_verify": True,
        },
        "algo": {"mini_batches": 2, "routing_replay": "R3"},
        "optim": {"lr": 1e-4},
        "train": {"steps": STEPS, "save_every": STEPS, "micro_batch_tokens": 256},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    config = write_config(directory / "config.yaml", settings)
    with running("train", config, log=directory / "log") as run:
        run.succeed()
    assert (directory / "run" / "hf" / "model.safetensors").is_file()
    return metrics(directory / "run")


def assert_healthy(rows: list[dict[str, Any]], mismatch: float = 0.03) -> None:
    """Finished, every figure finite, no step skipped, and learner and server of nearly one mind about each token."""
    assert len(rows) == STEPS
    for number, row in enumerate(rows, 1):
        broken = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        assert not broken, f"step {number}: {broken}"
        assert row["grad/skipped_steps"] == 0
        assert row["grad/norm"] > 0
        assert 0 <= row["mismatch/kl"] < mismatch, f"step {number}: mismatch/kl {row['mismatch/kl']}"
