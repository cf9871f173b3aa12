"""A small task and one uninterrupted run of it, which the other tests compare theirs with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import running, write_config
from tests.tiny import make_model

STEPS = 6


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random tiny MoE and problems; the reward asks for a digit, which chance gives now and then."""
    root = tmp_path_factory.mktemp("task")
    make_model(root / "model", kind="moe", num_hidden_layers=2)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (root / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


@pytest.fixture(scope="session")
def settings(task: Path) -> Callable[..., dict[str, Any]]:
    """The configuration of a short two-rank run below a directory."""

    def make(run_dir: Path) -> dict[str, Any]:
        return {
            "run": {"name": "run", "dir": str(run_dir)},
            "model": {"path": str(task / "model"), "dtype": "float32"},
            "data": {"train": str(task / "train.jsonl"), "max_prompt_tokens": 16},
            "reward": {"rewards": [{"name": "format", "options": {"pattern": ".*[0-9].*"}}]},
            "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 12, "publish_verify": True},
            "algo": {"mini_batches": 2},
            "optim": {"lr": 1e-3},
            "parallel": {"ep": 2},
            "train": {"steps": STEPS, "save_every": 2, "micro_batch_tokens": 256},
        }

    return make


@pytest.fixture(scope="session")
def unbroken(settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run."""
    root = tmp_path_factory.mktemp("unbroken")
    config = write_config(root / "config.yaml", settings(root))
    with running("train", config, log=root / "log") as run:
        run.succeed()
    return root / "run"
