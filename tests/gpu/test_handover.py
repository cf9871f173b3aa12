"""rollout.publish=tensor on a GPU: CUDA IPC to a process that takes tensors as SGLang does, and a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.gpu.needs import GPU

if TYPE_CHECKING:
    from tests.gpu.cases import Kind

pytestmark = GPU


def test_another_process_takes_tensors_of_the_gpu() -> None:
    """Two receivers, several buckets; what they have let go of is free again here."""
    from megasapo.rollout.handover import Shared
    from tests.gpu.receiver import receiving

    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated()
    with receiving() as one, receiving() as another:
        for version in (1.0, 2.0, 3.0):
            weights = [(f"w{i}", torch.full((1 << 20,), version * i, dtype=torch.bfloat16)) for i in range(3)]
            shared = Shared([(name, weight.to(device)) for name, weight in weights], device)
            expected = {name: float(weight.double().sum()) for name, weight in weights}
            assert one.take(shared.payload()) == expected
            assert another.take(shared.payload()) == expected
            shared.free()
            assert one.sums() == expected  # what it holds stays, freed here or not
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated() == before


def test_a_run_hands_its_weights_to_the_embedded_server(models: dict[Kind, Path], tmp_path: Path) -> None:
    from tests.gpu.quick_run import assert_healthy, quick_run

    assert_healthy(quick_run(models["moe"], tmp_path, device="cuda", rollout={"publish": "tensor"}))
