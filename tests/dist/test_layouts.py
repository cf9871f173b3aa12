"""A run that changes its layout between two starts: what it loads is what was saved, bit for bit, and it goes on the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dist.launcher import run_ranks
from tests.dist.small_run import Task, read_rows
from tests.tiny import make_model

LAYOUTS: list[dict[str, int]] = [{}, {"tp": 2}, {"ep": 2}, {"pp": 2}, {"tp": 1}, {}]  # one after another; of two ranks but for {}
STEPS = 2  # in each
COMPARED = ("loss/policy", "grad/norm", "ratio/log_var", "optim/lr")


def test_weights_and_optimizer_are_exact_in_any_layout(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind="moe", num_hidden_layers=2)
    whole = Task(str(model), str(tmp_path / "one"), str(tmp_path / "one.jsonl"), STEPS * len(LAYOUTS), {"save_every": 10})
    run_ranks(1, "tests.dist.small_run", whole.arguments(), logs=tmp_path / "logs")
    folder = tmp_path / "run" / "checkpoints"
    for i, parallel in enumerate(LAYOUTS):
        again = tmp_path / f"again{i}"
        moved = Task(
            **{"model": str(model), "run": str(tmp_path / "run"), "rows": str(tmp_path / "rows.jsonl")},
            **{"until": STEPS * (i + 1), "parallel": parallel, "again": str(again), "train": {"save_every": STEPS}},
        )
        outputs = run_ranks(2 if parallel else 1, "tests.dist.small_run", moved.arguments(), logs=tmp_path / f"logs{i}")
        if i > 0:
            name = f"step_{STEPS * i:08d}"
            assert f"{folder / name} is of another layout" in outputs[0]
            assert_same(tensors(folder / name), tensors(again / "checkpoints" / name))
    found, expected = read_rows(tmp_path / "rows.jsonl"), read_rows(tmp_path / "one.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, want in zip(found, expected, strict=True):
        for name in COMPARED:
            np.testing.assert_allclose(row[name], want[name], rtol=1e-3, atol=1e-9, err_msg=f"{row['step']} {name}")


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    import megasapo.mcore  # noqa: F401

    about = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {
        name: torch.full(meta.size, torch.nan, dtype=meta.properties.dtype)
        for name, meta in about.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    load(found, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return found


def assert_same(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    assert saved.keys() == loaded.keys()
    moments = [name for name in saved if name.startswith("optimizer.state.exp_avg_sq.")]
    weights = [name for name in saved if not name.startswith("optimizer.")]
    assert len(moments) == len(weights) > 10
    assert any(bool(saved[name].any()) for name in moments)
    different = [name for name in saved if not torch.equal(saved[name], loaded[name])]
    assert not different
