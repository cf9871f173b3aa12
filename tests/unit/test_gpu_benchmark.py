"""The GPU benchmark's script on a CPU: it runs to its end, refuses what it must, and leaves the docs alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_work import SLICE, Work, write_model
from megasapo.geometry import read_geometry


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries the script out where there is no GPU")
def test_the_script_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = {path: path.read_bytes() for path in gpu.DOCS.iterdir()}
    recipes = ["--recipes", "bf16", "mxfp8"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", *recipes, "--out", str(tmp_path)])
    gpu.main()
    page = (tmp_path / "gpu.md").read_text()
    assert page in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    by_name = {row[0]: row[1:] for row in rows}
    assert float(by_name["bf16"][0]) > float(by_name["bf16"][1]) > 0  # the optimizer is a part of the step
    assert by_name["mxfp8"][0] == "refused"
    assert "mxfp8 is refused: precision.recipe=mxfp8" in page
    assert by_name["none"][1] == "1.000"
    assert all(float(by_name[name][1]) > 0 for name in ("R2", "R3", "ours", "full logits"))
    assert {"met", "not met"} >= {by_name[name][2] for name in by_name if "by its" in name or "share" in name}
    assert "aten::mm" in (tmp_path / "gpu_profile.txt").read_text()
    assert {path: path.read_bytes() for path in gpu.DOCS.iterdir()} == docs


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch finds no CUDA GPU; --device cpu --tiny" in capsys.readouterr().err


def test_the_slice_is_of_qwen3_30b_a3b(tmp_path: Path) -> None:
    """The whole model has 30.53 billion parameters of which 3.35 are active (3.04 without the embedding)."""
    whole = read_geometry(write_model(tmp_path / "whole", SLICE | {"num_hidden_layers": 48})).parameters()
    assert (whole.total / 1e9, whole.active / 1e9) == pytest.approx((30.53, 3.35), abs=0.01)
    work = Work(write_model(tmp_path / "slice", SLICE), 16384, runs=1, warm_up=0, overrides={})
    assert sum(work.lengths) == 16384
    # by hand: attention, router and 8 experts of 4 layers, the head: 3 passes of 2 FLOPs a weight, attention's pairs
    weights = 4 * (2048 * 9216 + 2048 * 128 + 8 * 3 * 2048 * 768) + 151936 * 2048
    pairs = sum(n * (n + 1) // 2 for n in work.lengths)
    flops = 3 * (2 * weights * 16384 + 4 * 4 * 32 * 128 * pairs)
    assert read_geometry(work.model).training_flops(work.lengths) == flops
