"""What tools/inspect_checkpoint.py says of checkpoints, against figures computed from the tensors themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasapo.convert.command import main as convert
from megasapo.convert.inspect_command import main
from tests.tiny import make_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_checkpoint.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a checkpoint of it, and one that differs from it in two tensors."""
    root = tmp_path_factory.mktemp("models")
    make_model(root / "a", num_hidden_layers=2, num_experts=4)
    shutil.copytree(root / "a", root / "b")
    tensors = load_file(root / "b" / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"][3, 5] += 0.5
    tensors["model.norm.weight"] *= 1.25
    save_file(tensors, root / "b" / "model.safetensors", metadata={"format": "pt"})
    for name in ("a", "b"):
        target = ["--dst", str(root / f"{name}.mcore"), "parallel.tp=2", "parallel.ep=2"]
        assert convert(["hf-to-megatron", "--src", str(root / name), *target]) == 0
    return root


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["a", "a.mcore"])
def test_sizes_norms_and_experts(kind: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, models / kind)
    tensors = load_file(models / "a" / "model.safetensors")
    facts = found["checkpoint"]
    assert facts["kind"] == ("HF" if kind == "a" else "megatron-core")
    assert facts["tensors"] == len(tensors)
    assert facts["parameters"] == sum(t.numel() for t in tensors.values())
    assert facts["dtypes"]["float32"]["bytes"] == facts["bytes"] == 4 * facts["parameters"]
    assert facts.get("layout") == (
        None if kind == "a" else {"world_size": 2, "tp": 2, "pp": 1, "ep": 2, "cp": 1, "etp": 1, "vpp": 1}
    )
    rows = {row["name"]: row for row in found["tensors"]}
    assert rows.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert rows[name]["shape"] == list(tensor.shape)
        assert rows[name]["norm"] == pytest.approx(tensor.double().pow(2).sum().sqrt().item(), rel=1e-12)
        assert rows[name]["rms"] == pytest.approx(tensor.double().pow(2).mean().sqrt().item(), rel=1e-12)
        assert rows[name]["max_abs"] == tensor.abs().max().item()
        assert rows[name]["not_finite"] == 0
    by_weight = {(row["layer"], row["weight"]): row for row in found["experts"]}
    weights = ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "router")
    assert by_weight.keys() == {(layer, weight) for layer in (0, 1) for weight in weights}
    norms = [tensors[f"model.layers.1.mlp.experts.{e}.up_proj.weight"].double().norm().item() for e in range(4)]
    row = by_weight[1, "up_proj.weight"]
    assert (row["min"], row["max"]) == pytest.approx((min(norms), max(norms)))
    assert (row["smallest"], row["largest"]) == (norms.index(min(norms)), norms.index(max(norms)))
    mean = sum(norms) / 4
    assert row["spread"] == pytest.approx((sum((n - mean) ** 2 for n in norms) / 4) ** 0.5 / mean)
    router = tensors["model.layers.0.mlp.gate.weight"].double().pow(2).sum(1).sqrt()
    assert by_weight[0, "router"]["mean"] == pytest.approx(router.mean().item())


@pytest.mark.parametrize("pair", [("a", "b"), ("a.mcore", "b"), ("a", "b.mcore"), ("a.mcore", "b.mcore")])
def test_difference_in_any_combination(pair: tuple[str, str], models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, *(models / name for name in pair))["difference"]
    changed = {row["name"]: row for row in found["tensors"] if row["max_abs"]}
    down = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert changed.keys() == {down, "model.norm.weight"}
    before = load_file(models / "a" / "model.safetensors")[down].double().norm().item()
    assert changed[down]["max_abs"] == pytest.approx(0.5, rel=1e-6)
    assert changed[down]["relative"] == pytest.approx(0.5 / before, rel=1e-6)
    assert changed["model.norm.weight"]["relative"] == pytest.approx(0.25, rel=1e-6)
    assert (found["different"], found["only_first"], found["only_second"]) == (2, [], [])


def test_tables_name_what_differs_and_what_is_broken(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "a", tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"][3, 4] = torch.inf
    tensors["model.extra"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.ones(65)
    save_file(tensors, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    assert main([str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "layers.0.self_attn.q_proj" in line)
    assert row.split()[-1] == "1"
    assert "and 24 of single experts" in out
    assert out.endswith(
        "2 values are not finite: model.layers.0.mlp.experts.1.up_proj.weight, model.layers.0.self_attn.q_proj.weight\n"
    )
    rows = {row["name"]: row for row in told(capsys, tmp_path / "c")["tensors"]}
    rest = (
        load_file(models / "a" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].double().flatten()[1:]
    )
    found = rows["model.layers.0.self_attn.q_proj.weight"]
    assert (found["norm"], found["max_abs"]) == pytest.approx((rest.norm().item(), rest.abs().max().item()))
    assert main([str(models / "a.mcore"), str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert "model.norm.weight: shapes [64] and [65]" in out
    assert "only in the second: model.extra" in out
    for name in ("self_attn.q_proj", "mlp.experts.1.up_proj"):
        row = next(line for line in out.splitlines() if f"model.layers.0.{name}" in line)
        assert row.split()[1:] == ["0", "0", "1"]
    assert told(capsys, tmp_path / "c", tmp_path / "c")["difference"]["different"] == 0, "NaN is NaN"


def test_a_checkpoint_of_an_unknown_model_is_shown_by_its_own_keys(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "saved" / "mcore"
    shutil.copytree(models / "a.mcore", checkpoint)
    (checkpoint / "config.json").unlink()
    (tmp_path / "config.yaml").write_text("model: of another program")
    found = told(capsys, checkpoint)
    rows = {row["name"]: row for row in found["tensors"]}
    expected = load_file(models / "a" / "model.safetensors")["model.embed_tokens.weight"].double().norm().item()
    assert rows["embedding.word_embeddings.weight"]["norm"] == pytest.approx(expected)
    assert rows["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]["shape"] == [4, 64, 64]
    assert main([str(checkpoint), str(models / "a")]) == 2
    assert "--model" in capsys.readouterr().err
    assert told(capsys, checkpoint, models / "a", "--model", models / "a")["difference"]["different"] == 0


def test_files_are_compared_with_their_hashes(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(models / "a.mcore", tmp_path / "mcore")
    found = told(capsys, tmp_path / "mcore", models / "a.mcore", "--brief", "--verify")
    assert found["checkpoint"]["verified"] == found["against"]["verified"] == "4 files are as they were written"
    (file,) = (tmp_path / "mcore").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[70_000] ^= 1
    file.write_bytes(content)
    assert "verified" not in told(capsys, tmp_path / "mcore")["checkpoint"]
    for pair in (["mcore"], [models / "a.mcore", "mcore"]):
        assert main([str(tmp_path / directory) for directory in pair] + ["--verify"]) == 2
        assert "mcore is damaged: __0_0.distcp has another SHA-256" in capsys.readouterr().err
    assert main([str(models / "a"), "--brief", "--verify"]) == 2
    assert "--verify: no record with hashes" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(models: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    tool = [sys.executable, str(TOOL), str(models / "a"), "--brief"]
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(tool, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 141
    assert "BrokenPipeError" not in done.stderr  # torch's CUDA builds say there that they find no GPU


def test_brief_reads_no_tensor_and_mistakes_are_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "a.mcore", tmp_path / "mcore")
    for file in (tmp_path / "mcore").glob("*.distcp"):
        file.unlink()
    found = told(capsys, tmp_path / "mcore", "--brief")
    assert found.keys() == {"checkpoint"}
    assert found["checkpoint"]["tensors"] == len(load_file(models / "a" / "model.safetensors"))
    for arguments, said in [([tmp_path / "mcore"], "No such file"), ([tmp_path / "absent"], "no such directory")]:
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
