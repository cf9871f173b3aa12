"""A run's checkpoint, optimizer and all, as an HF directory: the very weights that the run exported itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megasapo.convert.command import main as convert
from megasapo.convert.inspect_command import main as inspect


def test_a_runs_newest_checkpoint_becomes_what_the_run_exported(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--src", str(unbroken), "--dst", str(tmp_path / "hf"), "--shard-size", "200KB", "--verify-tensors"]
    assert convert(["megatron-to-hf", *arguments]) == 0
    expected = load_file(unbroken / "hf" / "model.safetensors")
    found = {k: v for file in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    capsys.readouterr()

    steps = [str(unbroken / "checkpoints" / f"step_{n:08d}") for n in (4, 6)]
    assert inspect([*steps, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [told[name]["step"] for name in ("checkpoint", "against")] == [4, 6]
    assert told["checkpoint"]["layout"]["ep"] == 2
    changed = [row for row in told["difference"]["tensors"] if row["max_abs"]]
    assert changed, "two steps of training changed nothing"
    assert 0 < max(row["max_abs"] for row in changed) < 0.1
