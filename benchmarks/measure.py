"""What the benchmarks share: runs that alternate, medians of pairwise ratios, one line about the machine, a table.

Seconds are taken by the clock and of this process's CPU: waiting for a busy core is not in the latter.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class Seconds(NamedTuple):
    clock: float
    cpu: float

    def since(self, start: Seconds) -> Seconds:
        return Seconds(self.clock - start.clock, self.cpu - start.cpu)


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now() -> Seconds:
    """The clock and this process's CPU seconds; on CUDA once the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter(), time.process_time())


def timed(run: Callable[[], object]) -> Seconds:
    """One run."""
    start = now()
    run()
    return now().since(start)


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of another process so far."""
    times = process.cpu_times()
    return times.user + times.system


def alternate(
    runs: dict[str, Callable[[], Seconds]], repeats: int, warm_up: int = 1, rotate: bool = False
) -> dict[str, list[Seconds]]:
    """Each of `runs` in turn, `warm_up` rounds that do not count and then `repeats` that do.

    `rotate`: who begins a round ends the next one.
    """
    seen: dict[str, list[Seconds]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(warm_up + repeats):
        for name in order:
            seconds = runs[name]()
            if number >= warm_up:
                seen[name].append(seconds)
        if rotate:
            order = [*order[1:], order[0]]
    return seen


def median(runs: Sequence[Seconds]) -> Seconds:
    return Seconds(statistics.median(r.clock for r in runs), statistics.median(r.cpu for r in runs))


def ratio(numerator: Sequence[Seconds], denominator: Sequence[Seconds]) -> Seconds:
    """The median over pairs of runs that stood side by side."""
    pairs = list(zip(numerator, denominator, strict=True))
    return Seconds(
        statistics.median(a.clock / b.clock for a, b in pairs), statistics.median(a.cpu / b.cpu for a, b in pairs)
    )


def cells(runs: Sequence[Seconds]) -> tuple[str, str, str, str]:
    """For a table: seconds by the clock, median, least and most, and the median of CPU seconds."""
    clock, middle = [run.clock for run in runs], median(runs)
    return f"{middle.clock:.2f}", f"{min(clock):.2f}", f"{max(clock):.2f}", f"{middle.cpu:.2f}"


def machine(*packages: str) -> str:
    """Date, processor, threads, load and versions, in one line."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = [f"{name} {installed(name) or 'missing'}" for name in ("torch", *packages)]
    return (
        f"{datetime.date.today()}, {where}, {os.cpu_count()} cores{load}, {torch.get_num_threads()} thread(s), "
        f"python {platform.python_version()}, {', '.join(versions)}"
    )


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, columns aligned."""
    lines = [header, ["---"] * len(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def replace_section(path: Path, begin: str, end: str, lines: str) -> None:
    """Put lines between two marks of a page."""
    text = path.read_text()
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    path.write_text(f"{head}\n{lines}\n{tail}")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
