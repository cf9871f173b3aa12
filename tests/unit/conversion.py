"""What the tests of tools/convert_checkpoint.py share: calling it, and comparing HF directories bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from megasapo.convert.command import main
from tests.tiny import make_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def make_moe(root: Path) -> Path:
    """A directory with a model, `moe`, and a checkpoint of it, `moe.mcore`."""
    make_model(root / "moe", num_experts=4, num_hidden_layers=2)
    convert("hf-to-megatron", root / "moe", root / "moe.mcore", "parallel.tp=2", "parallel.ep=2")
    return root


def convert(direction: str, source: Path, target: Path, *more: str) -> None:
    assert main([direction, "--src", str(source), "--dst", str(target), *more]) == 0


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, f"{name}: {found[name].dtype}, not {value.dtype}"
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), f"{name} differs"
