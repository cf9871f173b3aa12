"""A training checkpoint written on a GPU goes on on a CPU, and the other way round: weights, optimizer, everything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.needs import GPU

if TYPE_CHECKING:
    from tests.gpu.cases import Kind

pytestmark = GPU
NEXT_STEP = 0.1  # relative: bfloat16 in other kernels, and experts that flip


@pytest.mark.parametrize("from_gpu", [True, False], ids=["GPU to CPU", "CPU to GPU"])
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_checkpoint_changes_devices(kind: Kind, from_gpu: bool, models: dict[Kind, Path], tmp_path: Path) -> None:
    from tests.gpu.sides import assert_carried_over, run_side

    saved = run_side(models[kind], tmp_path, "save", "saved", gpu=from_gpu)
    loaded = run_side(models[kind], tmp_path, "load", "loaded", gpu=not from_gpu)
    assert_carried_over(saved, loaded, NEXT_STEP)
