"""Model FLOPs against what torch counts in the learner's own model, and the figures that follow from them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megasapo import meter, metrics
from megasapo.config import Config
from megasapo.data.packing import pack
from megasapo.geometry import read_geometry
from megasapo.mcore.model import build_model, forward_micro_batch, read_hf_config
from megasapo.mcore.topology import Topology
from megasapo.meter import Meter
from megasapo.plan.hardware import GPUS, PEAKS, known_peak
from megasapo.sections import ModelConfig, ParallelConfig
from megasapo.types import Batch, MicroBatch, MiniBatch, TrainSequence
from tests.tiny import make_model

LENGTHS = (8, 21, 51)  # tokens; each more than twice the one before, so that attention pads none to another's length


def packed(lengths: tuple[int, ...], prompt: int) -> MicroBatch:
    rows = []
    for uid, n in enumerate(lengths):
        tokens = np.arange(n, dtype=np.int32) * 7 % 500
        rows.append(TrainSequence(uid, tokens, np.arange(n) >= prompt, np.zeros(n, np.float32), 1.0))
    return pack(rows, [1.0] * len(rows))


def addmm_flops(_into: Any, a: Any, b: Any, *, out_shape: Any = None, **_: Any) -> int:
    """Weight gradients are added in place, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize(("kind", "over"), [("moe", {"mlp_only_layers": [1]}), ("dense", {})])
def test_model_flops_are_those_that_torch_counts(tmp_path: Path, kind: Any, over: dict[str, Any]) -> None:
    """Torch counts attention over all pairs of a sequence, ours the causal half; and logits again in backward."""
    path = make_model(tmp_path, kind=kind, num_hidden_layers=3, **over)
    mb, geometry = packed(LENGTHS, prompt=5), read_geometry(path)
    topo = Topology.init(ParallelConfig())
    try:
        (chunk,) = build_model(ModelConfig(path=str(path), dtype="float32"), read_hf_config(path), topo)
        with sdpa_kernel(SDPBackend.MATH):  # plain products: torch counts no others on a CPU
            with FlopCounterMode(display=False) as forward:
                scores = forward_micro_batch(chunk, mb, temperature=1.0, topo=topo, with_entropy=True)
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as backward:
                scores.logp.sum().backward()
    finally:
        topo.destroy()
    slots = [n - 1 for n in LENGTHS]
    head_tokens = sum(n - 5 for n in LENGTHS)
    not_causal = sum(n * (n - 1) // 2 for n in slots) * geometry.pair_flops
    logits = head_tokens * 2 * geometry.vocab * geometry.hidden
    exact = geometry.forward_flops(slots, head_tokens)
    assert forward.get_total_flops() == exact + not_causal
    assert backward.get_total_flops() == 2 * (exact + not_causal) + logits
    assert geometry.training_flops(slots, head_tokens) == 3 * exact
    assert geometry.forward_flops(slots) - exact == logits / head_tokens * (sum(slots) - head_tokens)


def measured(geometry: Any, **over: Any) -> Meter:
    settings = {"counts_flops": True, "old_logprobs": True, "reference": False, "peak_flops": None, "sampler": None}
    return Meter(geometry=geometry, world_size=4, **settings | over)


def test_what_a_step_costs(tmp_path: Path) -> None:
    """Three mini-batches: all are learned from, the first needs no scoring before, the reference scores each."""
    geometry = read_geometry(make_model(tmp_path))
    mini = [MiniBatch((packed((n, n + 3), 4), packed((), 4)), 2, 0) for n in (10, 30, 50)]
    costs = [geometry.forward_flops((n - 1, n + 2), 2 * n - 5) for n in (10, 30, 50)]
    for over, scored in (
        ({}, sum(costs[1:])),
        ({"reference": True}, sum(costs) + sum(costs[1:])),
        ({"old_logprobs": False}, 0),
    ):
        taken = metrics.scalars(measured(geometry, **over).take(Batch(tuple(mini))))
        assert taken == {"perf/update_tflop": 3 * sum(costs) / 1e12, "perf/old_logprobs_tflop": scored / 1e12}
    assert measured(geometry, counts_flops=False).take(Batch(tuple(mini))) == {}


def test_rates() -> None:
    numbers = {"perf/update_tflop": 1600.0, "time/update_s": 2.0, "time/step_s": 5.0}
    assert measured(None).rates(numbers, 1000.0) == {"perf/tokens_per_s": 200.0, "perf/model_tflops": 200.0}
    found = measured(None, peak_flops=800e12).rates(numbers | {"gpu/energy_j": 400.0}, 1000.0)
    assert found["perf/mfu"] == 0.25
    assert found["perf/tokens_per_joule"] == 2.5
    assert np.isnan(measured(None).rates(numbers | {"gpu/energy_j": float("nan")}, 1.0)["perf/tokens_per_joule"])


@pytest.mark.parametrize(
    ("name", "bf16_tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H20", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_go_by_the_name_of_the_card(name: str, bf16_tflops: float | None) -> None:
    peak = known_peak(name)
    assert (peak.bf16 / 1e12 if peak else None) == bf16_tflops


def test_the_planner_has_the_same_peaks() -> None:
    assert {name: gpu.flops for name, gpu in GPUS.items()} == {n: PEAKS[(n.upper(),)].bf16 for n in GPUS}
    assert all(p.fp8 is None or 1.9 < p.fp8 / p.bf16 < 2.1 for p in PEAKS.values())


@pytest.mark.parametrize(
    ("card", "settings", "peak_tflops", "said"),
    [
        ("NVIDIA H200", {}, 989, ""),
        ("NVIDIA H200", {"precision": {"recipe": "fp8_blockwise"}}, 1979, ""),
        ("NVIDIA H200", {"precision": {"recipe": "fp8_blockwise", "emulate": True}}, 989, ""),
        ("NVIDIA H200", {"model": {"path": "m", "dtype": "float32"}}, None, "model.dtype=float32"),
        ("NVIDIA A100-SXM4-80GB", {"precision": {"recipe": "fp8_blockwise"}}, None, "has no FP8 products"),
        ("NVIDIA T4", {}, None, "the peak of 'NVIDIA T4' is unknown"),
    ],
)
def test_the_peak_is_that_of_the_precision_or_a_line_says_why_not(
    card: str, settings: dict[str, Any], peak_tflops: float | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: card)
    cfg = Config.model_validate({"model": {"path": "m"}} | settings)
    peak, why = meter.peak_flops(cfg, torch.device("cuda", 0))
    assert (peak and peak / 1e12) == peak_tflops
    assert said in why
    assert bool(why) == (peak is None)


def test_on_a_cpu_one_line_says_that_there_is_no_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_model(tmp_path, num_hidden_layers=1)
    cfg = Config.model_validate({"model": {"path": str(path)}, "log": {"gpu_every_s": 0}})
    for rank, lines in ((0, ["no perf/mfu: the peak of a CPU is unknown"]), (1, [])):
        topo: Any = SimpleNamespace(rank=rank, world_size=2, is_leader=True, device=torch.device("cpu"))
        started = Meter.start(cfg, topo, old_logprobs=True, reference=False)
        assert capsys.readouterr().out.splitlines() == lines
        assert started.peak_flops is None
        assert started.sampler is None
        started.close()
