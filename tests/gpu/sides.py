"""Runs the two sides of a checkpoint (checkpoint_side.py) and compares what they hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.launcher import ROOT

TIMEOUT_S = 240


def run_side(model: Path, directory: Path, action: str, name: str, *, gpu: bool, te_like: bool = False) -> Any:
    """What the side leaves; without `gpu` it sees no GPU, so that megatron-core runs with the patches for a CPU."""
    directory.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not gpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "tests.gpu.checkpoint_side", str(model), str(directory), action, name]
    command += ["--te-like-adam"] if te_like else []
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{action} on {'a GPU' if gpu else 'the CPU'}:\n{(done.stdout + done.stderr)[-6000:]}"
    result = torch.load(directory / f"{name}.pt", weights_only=False)
    assert result["device"] == ("cuda" if gpu else "cpu")
    return result


def assert_carried_over(saved: Any, loaded: Any, next_step: float) -> None:
    """Weights bit for bit, Adam's masters, moments and count; the step after is the same within `next_step`."""
    assert loaded["weights"].keys() == saved["weights"].keys()
    differs = [name for name, value in saved["weights"].items() if not torch.equal(loaded["weights"][name], value)]
    assert not differs, f"weights that changed on the way: {differs}"
    assert loaded["steps"] == saved["steps"] == [2]
    assert len(loaded["state"]) == len(saved["state"])
    for found, wanted in zip(loaded["state"], saved["state"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)
        assert wanted["exp_avg"] > 0
    for name in ("loss/policy", "grad/norm", "entropy/mean"):
        assert loaded["next"][name] == pytest.approx(saved["next"][name], rel=next_step, abs=1e-3), name
