"""GPUs, and the assumptions that turn FLOPs and bytes into seconds: every number that the planner does not derive.

Read by memory.py, traffic.py and timing.py; docs/planner.md repeats the tables of GPUs and assumptions. Peaks are the
makers' figures for dense products; the factors are what well-tuned runs reach, not promises. meter.py measures against
the peaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    memory_bytes: float  # usable by one process
    flops: float  # a second, bf16 dense
    hbm: float  # bytes a second
    nvlink: float  # bytes a second and direction, to all GPUs of its node together
    network: float  # bytes a second and direction, of the GPU's own network card


@dataclass(frozen=True, slots=True)
class Peak:
    """FLOPs a second, dense, accumulated in fp32; None: the card has no such products."""

    bf16: float
    fp8: float | None


# by words of the name that the driver gives a card; of several entries that fit, the one with the most words
PEAKS: dict[tuple[str, ...], Peak] = {
    ("A100",): Peak(312e12, None),
    ("L4",): Peak(121e12, 242e12),
    ("L40S",): Peak(362e12, 733e12),
    ("H100",): Peak(989e12, 1979e12),
    ("H100", "PCIE"): Peak(756e12, 1513e12),
    ("H100", "NVL"): Peak(835e12, 1671e12),
    ("H200",): Peak(989e12, 1979e12),
    ("H200", "NVL"): Peak(835e12, 1671e12),
    ("GH200",): Peak(989e12, 1979e12),
    ("B200",): Peak(2250e12, 4500e12),
    ("GB200",): Peak(2500e12, 5000e12),
}


def known_peak(device_name: str) -> Peak | None:
    """That of a card by the name that torch.cuda.get_device_name gives it; None for others, and for parts of a card."""
    words = set(re.findall(r"[A-Z0-9]+", device_name.upper()))
    fitting = [entry for entry in PEAKS if words.issuperset(entry)]
    return None if "MIG" in words or not fitting else PEAKS[max(fitting, key=len)]


GPUS = {
    "h100": Gpu(memory_bytes=79 * GIB, flops=989e12, hbm=3.35e12, nvlink=450e9, network=50e9),
    "h200": Gpu(memory_bytes=139 * GIB, flops=989e12, hbm=4.8e12, nvlink=450e9, network=50e9),
    "b200": Gpu(memory_bytes=178 * GIB, flops=2250e12, hbm=8.0e12, nvlink=900e9, network=50e9),
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Fractions of peak, and memory that no formula gives."""

    gemm: float = 0.60
    """Products with weights that all tokens share, the head's included."""
    grouped_gemm: float = 0.40
    """The experts' products: small matrices, uneven loads."""
    attention_forward: float = 0.50
    attention_backward: float = 0.40
    attention_backward_work: float = 2.5
    """Times the forward's FLOPs: fused kernels compute the scores again."""
    element_wise_passes: float = 3.0
    """How often each saved activation is moved through memory in forward (twice that in backward)."""
    hbm: float = 0.75
    link: float = 0.75
    fp32_slowdown: float = 16.0
    """fp32 products against bf16 ones (no tensor cores)."""
    load_imbalance: float = 1.10
    """The fullest expert-parallel rank against the mean."""
    reserve_bytes: float = 4 * GIB
    """CUDA context, cuBLAS and NCCL buffers."""
    fragmentation: float = 1.08
    """What the allocator holds against what is in use, of activations."""


ASSUMED = Assumptions()
