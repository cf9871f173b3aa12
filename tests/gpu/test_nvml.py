"""NVML on a real card: the sampler finds the learner's GPU and what it says can be true."""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING

import pytest
import torch

from tests.gpu.needs import GPU

if TYPE_CHECKING:
    from megasapo.mcore.topology import Topology

has_nvml = pytest.mark.skipif(
    importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed: pip install nvidia-ml-py"
)
pytestmark = [*GPU, has_nvml]


def test_the_sampler_sees_the_gpu_at_work(topo: Topology) -> None:
    from megasapo.log.nvml import start_sampler

    sampler = start_sampler(0.1, topo)
    assert sampler is not None, "no sampler of this GPU; the log says why"
    try:
        held = torch.zeros(2**28, device="cuda")  # 2^30 bytes
        matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            torch.mm(matrix, matrix)
            torch.cuda.synchronize()
        figures = {name: metric.value() for name, metric in sampler.take().items()}
    finally:
        sampler.close()
    own = {name.removeprefix("gpu/0/"): value for name, value in figures.items() if name.startswith("gpu/0/")}
    assert own["memory_gb"] > held.nbytes / 1e9
    assert own["util"] > 20
    limits = {"power_w": (50, 2000), "temperature_c": (10, 110), "clock_mhz": (200, 4000), "throttled_frac": (0, 1)}
    for name, (low, high) in limits.items():
        if name in own:  # a virtual machine may hide it, and then the log has said so
            assert low <= own[name] <= high, f"{name}={own[name]}"
    if "gpu/energy_j" in figures and "power_w" in own:
        assert figures["gpu/energy_j"] == pytest.approx(3 * own["power_w"], rel=0.5)
