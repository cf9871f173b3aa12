"""GPUs, and the assumptions that turn FLOPs and bytes into seconds: every number that the planner does not derive.

Read by memory.py, traffic.py and timing.py; docs/planner.md repeats both tables. Peaks are the makers' figures for
dense bf16; the factors are what well-tuned runs reach, not promises.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    memory_bytes: float  # usable by one process
    flops: float  # a second, bf16 dense
    hbm: float  # bytes a second
    nvlink: float  # bytes a second and direction, to all GPUs of its node together
    network: float  # bytes a second and direction, of the GPU's own network card


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
