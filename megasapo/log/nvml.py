"""What each rank's GPU does, by NVIDIA's management library: sampled in the background, handed over once a step.

`start_sampler` is called on every rank by meter.py; docs/monitoring.md explains the figures. Nothing that the library
answers ends a run: what a card does not report is left out, and the log says so once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megasapo import launch
from megasapo.metrics import Mean, Metric, Sum
from megasapo.types import Ranks

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
ALL_LINKS = 2**32 - 1  # as the scope of a field: the sum over a card's NVLinks

# what lowers clocks: bits of nvmlDeviceGetCurrentClocksThrottleReasons
POWER = 0x4 | 0x80  # the power limit, the board's power brake
THERMAL = 0x20 | 0x40  # driver and hardware, because of heat
THROTTLED = POWER | THERMAL | 0x8 | 0x10  # any hardware slow-down, synchronised boost; not idleness or a user's limit

# (pynvml, handle) -> number
Reading = Callable[[Any, Any], float]


def _field(name: str, scale: float = 1.0, scope: int = 0) -> Reading:
    def read(nvml: Any, handle: Any) -> float:
        (found,) = nvml.nvmlDeviceGetFieldValues(handle, [(getattr(nvml, name), scope)])
        if found.nvmlReturn != nvml.NVML_SUCCESS:
            raise nvml.NVMLError(found.nvmlReturn)
        is_int = found.valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_INT
        return (found.value.uiVal if is_int else found.value.ullVal) * scale

    return read


def _ecc(nvml: Any, handle: Any) -> float:
    return nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)


NOW: dict[str, Reading] = {  # what holds at the moment
    "util": lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    "memory_gb": lambda nvml, handle: nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
    "power_w": lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
    "temperature_c": lambda nvml, handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    "clock_mhz": lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
    "throttled": lambda nvml, handle: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    "ecc_errors": _ecc,
}
COUNTED: dict[str, Reading] = {  # what has been counted since the driver was loaded
    "energy_j": lambda nvml, handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
    "nvlink_tx_gb": _field("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", 1024 / 1e9, ALL_LINKS),
    "nvlink_rx_gb": _field("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", 1024 / 1e9, ALL_LINKS),
    "nvlink_crc_errors": _field("NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL"),
    "nvlink_replay_errors": _field("NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL"),
    "nvlink_recovery_errors": _field("NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL"),
}


class Card:
    """One GPU, or one MIG instance of one."""

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        """`nvml`: the module pynvml, initialised; `name`: what the log calls the card."""
        self._nvml, self._handle, self._name = nvml, handle, name
        self._readings = {**NOW, **COUNTED}
        self.uuid = str(nvml.nvmlDeviceGetUUID(handle))

    def read(self, names: Mapping[str, Reading]) -> dict[str, float]:
        """Those of `names` that the card reports; what it refuses now is not asked for again."""
        found: dict[str, float] = {}
        refused: dict[str, str] = {}
        for name in [name for name in names if name in self._readings]:
            try:
                found[name] = float(self._readings[name](self._nvml, self._handle))
            except self._nvml.NVMLError as e:
                if e.value in (self._nvml.NVML_ERROR_GPU_IS_LOST, self._nvml.NVML_ERROR_RESET_REQUIRED):
                    self._readings = {}
                    log.warning("%s: %s; its gpu/ figures end here", self._name, e)
                    return {}
                del self._readings[name]
                refused[name] = str(e)
        if refused:
            reasons = ", ".join(f"{name} ({refused[name]})" for name in sorted(refused))
            log.warning("%s does not report %s: left out", self._name, reasons)
        return found


class Sampler:
    """Reads a card every `period_s` in a thread of its own; `take` sums up what came since the last `take`."""

    def __init__(self, card: Card, rank: int, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._card, self._prefix, self._period_s, self._clock = card, f"gpu/{rank}/", period_s, clock
        self._lock = threading.Lock()
        first = card.read(NOW)
        self._samples = [first] if first else []
        self._counted = card.read(COUNTED)
        self._power = first.get("power_w")
        self._joules = 0.0  # power over time: for cards that do not count energy themselves
        self._taken_at = self._sampled_at = clock()
        self.measures_energy = "energy_j" in self._counted or self._power is not None
        self.reports_energy = self.measures_energy
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; a reading under way is waited for."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(self._period_s):
            self.sample()

    def sample(self) -> None:
        """One reading of what holds at the moment."""
        with self._lock:
            found = self._card.read(NOW)
            self._advance()
            self._power = found.get("power_w")
            if found:
                self._samples.append(found)

    def _advance(self) -> None:
        """Energy up to now, at the power of the last reading; not a number once there is none."""
        now = self._clock()
        self._joules += (float("nan") if self._power is None else self._power) * (now - self._sampled_at)
        self._sampled_at = now

    def take(self) -> dict[str, Metric]:
        """The figures of the time since the last call, by their names in metrics.jsonl."""
        if not self._samples:  # a step shorter than the period
            self.sample()
        with self._lock:
            samples, self._samples = self._samples, []
            before, self._counted = self._counted, self._card.read(COUNTED)
            self._advance()
            joules, self._joules = self._joules, 0.0
            seconds, self._taken_at = self._sampled_at - self._taken_at, self._sampled_at
        counted = {name: now - before[name] for name, now in self._counted.items() if name in before}
        figures = _summary(samples) | _rates(counted, seconds)
        metrics: dict[str, Metric] = {self._prefix + name: Mean(value, 1.0) for name, value in figures.items()}
        if self.reports_energy:
            # a card that has gone makes the sum over all ranks unknown, not smaller
            by_counter = counted.get("energy_j", float("nan")) if "energy_j" in before else joules
            metrics["gpu/energy_j"] = Sum(by_counter)
        return metrics


def _summary(samples: list[dict[str, float]]) -> dict[str, float]:
    of = {name: [s[name] for s in samples if name in s] for name in NOW}
    of = {name: values for name, values in of.items() if values}
    means = ("util", "power_w", "clock_mhz", "memory_clock_mhz")
    found = {name: sum(of[name]) / len(of[name]) for name in means if name in of}
    found |= {name: max(of[name]) for name in ("memory_gb", "temperature_c", "ecc_errors") if name in of}
    if "clock_mhz" in of:
        found["clock_mhz_min"] = min(of["clock_mhz"])
    if "throttled" in of:
        reasons = [int(bits) for bits in of["throttled"]]
        for name, mask in (("throttled", THROTTLED), ("throttled_power", POWER), ("throttled_thermal", THERMAL)):
            found[f"{name}_frac"] = sum(bool(bits & mask) for bits in reasons) / len(reasons)
    return found


def _rates(counted: Mapping[str, float], seconds: float) -> dict[str, float]:
    """NVLink's: gigabytes a second, errors of the step."""
    moved = [name for name in ("nvlink_tx_gb", "nvlink_rx_gb") if name in counted and seconds > 0]
    found = {f"{name}_s": counted[name] / seconds for name in moved}
    errors = [count for name, count in counted.items() if name.endswith("_errors")]
    return found | ({"nvlink_errors": sum(errors)} if errors else {})


def start_sampler(period_s: float, ranks: Ranks) -> Sampler | None:
    """Collective. A running sampler of this rank's own GPU; None, said once on rank 0, where that cannot be.

    `period_s` 0: none anywhere. A GPU that several ranks share is counted once in gpu/energy_j, which is left out
    altogether when some rank cannot measure it.
    """
    if not period_s:
        return None
    card, problem = _open_card(ranks.device)
    sampler = Sampler(card, ranks.rank, period_s) if card is not None else None
    own = (problem, card.uuid if card is not None else "", sampler is not None and sampler.measures_energy)
    found: list[tuple[str, str, bool]] = ranks.gather(own)
    if ranks.rank == 0:
        _explain([problem for problem, _, _ in found])
    if sampler is None:
        return None
    owner = [uuid for _, uuid, _ in found].index(own[1])
    sampler.reports_energy = owner == ranks.rank and all(measures for _, _, measures in found)
    sampler.start()
    return sampler


NO_GPU = "it computes on the CPU"


def _explain(problems: list[str]) -> None:
    """One line for each reason why ranks have no sampler."""
    for each in dict.fromkeys(problem for problem in problems if problem):
        at = [rank for rank, problem in enumerate(problems) if problem == each]
        line = f"no gpu/ figures of {'this run' if len(at) == len(problems) else f'ranks {at}'}: {each}"
        if each == NO_GPU:
            print(line, flush=True)  # nothing to worry about
        else:
            log.warning("%s", line)


def _open_card(device: torch.device) -> tuple[Card | None, str]:
    """The card behind a torch device, or why there is none."""
    if device.type != "cuda":
        return None, NO_GPU
    import torch

    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed: pip install nvidia-ml-py"
    index = device.index or 0
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    visible = launch.visible_device(index)
    # NVML counts without CUDA_VISIBLE_DEVICES, and a MIG instance is none of its numbers: only names agree
    names = [visible] if visible.startswith("MIG-") else [f"GPU-{uuid}", f"MIG-{uuid}"]
    try:
        pynvml.nvmlInit()
        return Card(pynvml, _handle(pynvml, names), f"GPU {index} ({names[0]})"), ""
    except pynvml.NVMLError as e:
        return None, f"NVML does not give access to {' or '.join(names)}: {e}"


def _handle(nvml: Any, names: list[str]) -> Any:
    """Of the first name that the driver knows; raises NVMLError of the last."""
    *others, last = names
    for name in others:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError as e:
            if e.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
                raise
    return nvml.nvmlDeviceGetHandleByUUID(last)
