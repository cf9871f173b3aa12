"""A run's checkpoint as an HF directory, the very weights that the run exported itself; a converted one as a start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megasapo.convert.command import main as convert
from megasapo.convert.inspect_command import main as inspect
from tests.e2e.runs import running, write_config
from tests.tiny import add_mtp, make_model


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


def test_training_starts_from_a_converted_checkpoint(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """`model.load` of another model's weights in another layout: the server gets them, and a step that moves nothing
    exports them bit for bit, with the layer for multi-token prediction that `model.path` has."""
    shape = {"kind": "glm4_moe", "num_hidden_layers": 2}
    make_model(tmp_path / "served", **shape)
    expected = load_file(make_model(tmp_path / "loaded", **shape, seed=1) / "model.safetensors")
    expected |= add_mtp(tmp_path / "served")
    arguments = ["--src", str(tmp_path / "loaded"), "--dst", str(tmp_path / "mcore"), "parallel.tp=2"]
    assert convert(["hf-to-megatron", *arguments]) == 0

    given = settings(tmp_path)
    given["model"] |= {"path": str(tmp_path / "served"), "load": str(tmp_path / "mcore")}
    given["optim"] |= {"lr": 1e-30}
    given["train"] |= {"steps": 1}
    config = write_config(tmp_path / "config.yaml", given)
    with running("train", config, log=tmp_path / "log") as run:
        output = run.succeed()
    assert f"multi-token prediction of {tmp_path / 'served'} are as they were before training" in output
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["mismatch/logprob_abs_diff"] < 1e-4, "the server sampled with other weights"
    assert_exported(tmp_path / "run" / "hf", expected)
    assert convert(["megatron-to-hf", "--src", str(tmp_path / "run"), "--dst", str(tmp_path / "again")]) == 0
    assert_exported(tmp_path / "again", expected)


def assert_exported(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 1e-20, name  # zeros, of the padding token's embedding, move by lr
    assert json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"] == 1
