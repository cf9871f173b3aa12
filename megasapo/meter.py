"""What a step costs the learner's hardware: model FLOPs and the share of the GPU's peak that they are, energy a token.

Made by train.py and sft.py. FLOPs are counted from the real lengths of the batch (geometry.py), seconds are the loop's,
energy comes from log/nvml.py; docs/monitoring.md defines the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megasapo.config import Config
from megasapo.geometry import BACKWARD, Geometry, read_geometry
from megasapo.log.nvml import Sampler, start_sampler
from megasapo.metrics import Metric, Sum
from megasapo.plan.hardware import known_peak
from megasapo.types import Batch, MicroBatch

if TYPE_CHECKING:
    import torch

    from megasapo.mcore.topology import Topology


@dataclass(frozen=True)
class Meter:
    geometry: Geometry
    world_size: int
    counts_flops: bool  # one rank of each replica does
    old_logprobs: bool  # whether all mini-batches but the first are scored before they are learned from
    reference: bool  # whether the reference model scores all of them
    peak_flops: float | None  # of one rank's device, a second, at the run's precision
    sampler: Sampler | None

    @staticmethod
    def start(cfg: Config, topo: Topology, *, old_logprobs: bool, reference: bool) -> Meter:
        """Collective. Says on rank 0 what cannot be measured here, and why."""
        peak, unknown = peak_flops(cfg, topo.device)
        if unknown and topo.rank == 0:
            print(f"no perf/mfu: {unknown}", flush=True)
        sampler = start_sampler(cfg.log.gpu_every_s, topo)
        geometry = read_geometry(cfg.model.path)
        return Meter(geometry, topo.world_size, topo.is_leader, old_logprobs, reference, peak, sampler)

    def take(self, batch: Batch) -> dict[str, Metric]:
        """This rank's share of a step's figures, to be merged over all ranks; `batch` is what was learned from."""
        metrics = self.sampler.take() if self.sampler is not None else {}
        if self.counts_flops:
            forward = [sum(self._forward_flops(micro) for micro in mini.micro) for mini in batch.mini]
            update = (1 + BACKWARD) * sum(forward)
            scored = sum(forward[1:]) * self.old_logprobs + sum(forward) * self.reference
            metrics |= {"perf/update_tflop": Sum(update / 1e12), "perf/old_logprobs_tflop": Sum(scored / 1e12)}
        return metrics

    def _forward_flops(self, micro: MicroBatch) -> int:
        """Of the whole replica: what the loss needs, without padding and without what recomputation adds."""
        return self.geometry.forward_flops(micro.slots, head_tokens=int(micro.loss_tokens.sum()))

    def rates(self, numbers: Mapping[str, float], tokens: float) -> dict[str, float]:
        """What follows from the merged figures and the times of a step that processed so many tokens."""
        tflops = numbers["perf/update_tflop"] / self.world_size / numbers["time/update_s"]
        found = {"perf/tokens_per_s": tokens / numbers["time/step_s"], "perf/model_tflops": tflops}
        if self.peak_flops is not None:
            found["perf/mfu"] = tflops * 1e12 / self.peak_flops
        if joules := numbers.get("gpu/energy_j"):
            found["perf/tokens_per_joule"] = tokens / joules
        return found

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()


def peak_flops(cfg: Config, device: torch.device) -> tuple[float | None, str]:
    """FLOPs a second of a device at the run's precision, or None and why they are unknown."""
    if device.type != "cuda":
        return None, "the peak of a CPU is unknown"
    import torch

    name = torch.cuda.get_device_name(device)
    known = known_peak(name)
    if known is None:
        return None, f"the peak of {name!r} is unknown (known ones: megasapo/plan/hardware.py)"
    if cfg.precision.quantises and not cfg.precision.emulate:
        return known.fp8, "" if known.fp8 else f"{name!r} has no FP8 products"
    if cfg.model.dtype != "bfloat16":
        return None, f"model.dtype={cfg.model.dtype}, and only the peaks of bfloat16 and FP8 are known"
    return known.bf16, ""
