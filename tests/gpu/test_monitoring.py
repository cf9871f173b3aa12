"""The sampler on a real card, and a profile with its kernels."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megasapo import metrics, run
from megasapo.log.nvml import start_sampler
from megasapo.log.profile import Profiler
from megasapo.sections import ProfileSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


def busy(seconds: float) -> None:
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()


def test_this_ranks_own_card_is_sampled() -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    held = torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda")
    ranks = SimpleNamespace(rank=0, device=torch.device("cuda", 0), gather=lambda own: [own])
    sampler = start_sampler(0.2, ranks)
    assert sampler is not None
    busy(2.0)
    found = metrics.scalars(sampler.take())
    sampler.close()
    assert found["gpu/0/memory_gb"] * 1e9 > held.nbytes
    assert found["gpu/0/util"] > 0
    if "gpu/energy_j" in found and "gpu/0/power_w" in found:
        # both are the card's own: they agree but for the time that a reading lags behind
        assert 0.2 < found["gpu/energy_j"] / (2.0 * found["gpu/0/power_w"]) < 5


def test_a_trace_has_kernels_inside_its_phases(tmp_path: Path) -> None:
    profiler = Profiler(ProfileSpec(start=1, stop=1), tmp_path, 0, torch.device("cuda", 0))
    phases = run.Phases(profiler.phase)
    profiler.at(1)
    with phases("update"):
        busy(0.1)
    profiler.close()
    (path,) = (tmp_path / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    (update,) = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == "update"]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    assert kernels
    assert all(update["ts"] <= e["ts"] and e["ts"] + e["dur"] <= update["ts"] + update["dur"] for e in kernels)
