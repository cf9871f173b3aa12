"""Records what the NVML of this machine answers, as a script for tests/unit/test_nvml.py.

    python -m tests.gpu.record_nvml OUT.json [--steps 3] [--period-s 0.5]

Needs a GPU and nvidia-ml-py; the GPU is left alone but for some matrix products.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pynvml
import torch

from megasapo.log.nvml import Card, Sampler
from tests.nvml_script import Recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--period-s", type=float, default=0.5)
    args = parser.parse_args()
    recorder = Recorder(pynvml)
    recorder.nvmlInit()
    name = torch.cuda.get_device_name(0)
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    sampler = Sampler(Card(recorder, recorder.nvmlDeviceGetHandleByUUID(uuid), name), 0, args.period_s)
    sampler.start()
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for step in range(args.steps):
        until = time.monotonic() + 4 * args.period_s
        while time.monotonic() < until:
            torch.mm(matrix, matrix)
            torch.cuda.synchronize()
        print(step, {metric: found.value() for metric, found in sampler.take().items()})
    sampler.close()
    driver = pynvml.nvmlSystemGetDriverVersion()
    recorder.save(args.out, name, f"recorded, driver {driver}, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
