"""Where a run's numbers go: console, metrics.jsonl and TensorBoard, behind one Protocol.

Called by train, sft and evaluate on the main rank. Knows metric names only to choose what the console shows.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from tqdm import tqdm

from megasapo import jsonl, launch
from megasapo.metrics import Hist
from megasapo.sections import LogConfig

BAR_WIDTH = 20
ROLLED_BACK = "metrics.rolled_back.jsonl"
CONSOLE = (  # label, metric, format: what the console shows, where a step has it
    ("reward", "reward/mean", ".3f"),
    ("loss", "loss/sft", ".3f"),
    ("pass@1", "eval/pass@1", ".3f"),
    ("length", "response/length_mean", ".1f"),
    ("gate+", "sapo/gate_mean_pos", ".3f"),
    ("gate-", "sapo/gate_mean_neg", ".3f"),
    ("tokens/s", "perf/tokens_per_s", ".0f"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step has to say."""

    number: int
    scalars: Mapping[str, float]
    histograms: Mapping[str, Hist] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, np.ndarray] = field(default_factory=dict)  # [H, W, 3] uint8


class Sink(Protocol):
    """Takes steps; `close` makes them safe on disk.

    `rewind`: the run went back to `last_step`, for the `rollback`-th time and for a reason `why`.
    """

    def log(self, step: Step) -> None: ...

    def rewind(self, last_step: int, rollback: int, why: str) -> None: ...

    def close(self) -> None: ...


class Log:
    """Hands every step to all sinks; without sinks (ranks other than the main one) it does nothing."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def __call__(
        self,
        number: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Hist] | None = None,
        texts: Mapping[str, str] | None = None,
        images: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        step = Step(number, scalars, histograms or {}, texts or {}, images or {})
        for sink in self._sinks:
            sink.log(step)

    def rewind(self, last_step: int, rollback: int, why: str) -> None:
        """Every sink goes back to `last_step`; see Sink."""
        for sink in self._sinks:
            sink.rewind(last_step, rollback, why)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_log(
    cfg: LogConfig,
    run_dir: Path,
    is_main: bool,
    *,
    resume_step: int | None = None,
    total_steps: int | None = None,
) -> Log:
    """The configured sinks of a run, on the main rank; elsewhere a Log that does nothing.

    `resume_step`: the last step that the run keeps (None: a fresh start, what an earlier run left is cut).
    `total_steps` is for the progress bar.
    """
    if not is_main:
        return Log([])
    run_dir.mkdir(parents=True, exist_ok=True)
    make: dict[str, Callable[[], Sink]] = {
        "console": lambda: ConsoleSink(total_steps, resume_step or 0, sys.stdout),
        "jsonl": lambda: JsonlSink(run_dir / "metrics.jsonl", resume_step),
        "tensorboard": lambda: TensorBoardSink(run_dir / "tensorboard", resume_step),
    }
    return Log([make[name]() for name in cfg.sinks])


class ConsoleSink:
    """A progress bar on a terminal; lines where the output is a file or a pipe, at most one every `line_every_s`.

    Under Slurm the lines begin with node and attempt.
    """

    def __init__(self, total_steps: int | None, start: int, stream: TextIO, line_every_s: float = 1.0) -> None:
        self._total, self._stream, self._line_every_s = total_steps, stream, line_every_s
        self._last_line_at = -math.inf
        self._shown: dict[str, str] = {}
        place = launch.place()
        self._who = f"{place.host} attempt {place.attempt} " if place.job else ""
        self._bar: Any = None
        if stream.isatty() and _has_size(stream):
            shown_from = 1e-9  # the first step on: until then others have something to say
            self._bar = tqdm(
                total=total_steps, initial=start, unit="step", file=stream, dynamic_ncols=True, delay=shown_from
            )

    def log(self, step: Step) -> None:
        now = {label: format(step.scalars[name], spec) for label, name, spec in CONSOLE if name in step.scalars}
        now |= {label: "-" for label in ("gate+", "gate-") if now.get(label) == "nan"}  # no advantage has that sign
        if self._bar is not None:
            self._shown |= now  # what only some steps have, such as an evaluation, stays in sight
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(step.number - self._bar.n)
            self._bar.refresh()
            return
        is_special = step.number == self._total or "pass@1" in now
        if time.monotonic() - self._last_line_at < self._line_every_s and not is_special:
            return
        self._last_line_at = time.monotonic()
        values = "  ".join(f"{label} {value}" for label, value in now.items())
        self._stream.write(f"{self._who}{self._progress(step.number)}  {values}".rstrip() + "\n")
        self._stream.flush()

    def rewind(self, last_step: int, rollback: int, why: str) -> None:
        if self._bar is not None:
            self._bar.update(last_step - self._bar.n)
        self._stream.write(f"\n{self._who}rolled back to step {last_step}: {why}\n")
        self._stream.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _progress(self, step: int) -> str:
        if self._total is None:
            return f"step {step}"
        done = min(BAR_WIDTH, BAR_WIDTH * step // self._total)
        return f"[{'#' * done}{'-' * (BAR_WIDTH - done)}] step {step:>{len(str(self._total))}}/{self._total}"


def _has_size(terminal: TextIO) -> bool:
    """False where nobody has said how large it is, as in a container: a bar would be invisible."""
    try:
        return all(os.get_terminal_size(terminal.fileno()))
    except OSError:
        return True


class JsonlSink:
    """metrics.jsonl: one object a step, on disk when `log` returns. Not-a-number and infinities are written as null.

    Opening it cuts what lies behind `resume_step`, a torn last line included, so that a resumed run's file is the
    uninterrupted one's. Lines that a roll-back undoes move to metrics.rolled_back.jsonl, with its number.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        if resume_step is None:
            path.unlink(missing_ok=True)
        else:
            jsonl.keep(path, lambda row: row["step"] <= resume_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: Step) -> None:
        row = {"step": step.number} | {name: x if math.isfinite(x) else None for name, x in step.scalars.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def rewind(self, last_step: int, rollback: int, why: str) -> None:
        self._file.close()
        undone = [{"rollback": rollback} | row for row in jsonl.read(self._path) if row["step"] > last_step]
        jsonl.append(self._path.with_name(ROLLED_BACK), undone)
        jsonl.keep(self._path, lambda row: row["step"] <= last_step)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Event files below `directory`; of a step logged twice, before and after a kill, it shows the second."""

    def __init__(self, directory: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_from = 0 if resume_step is None else resume_step + 1
        self._open = lambda purge_step: SummaryWriter(str(directory), purge_step=purge_step)
        self._writer = self._open(purge_from)

    def log(self, step: Step) -> None:
        for name, value in step.scalars.items():
            self._writer.add_scalar(name, value, step.number)
        for name, hist in step.histograms.items():
            self._add_histogram(name, hist, step.number)
        for name, text in step.texts.items():
            self._writer.add_text(name, text, step.number)
        for name, pixels in step.images.items():
            self._writer.add_image(name, pixels, step.number, dataformats="HWC")
        self._writer.flush()

    def rewind(self, last_step: int, rollback: int, why: str) -> None:
        self._writer.close()
        self._writer = self._open(last_step + 1)
        self._writer.add_text("stability/rolled_back", why, last_step)

    def close(self) -> None:
        self._writer.close()

    def _add_histogram(self, name: str, hist: Hist, step: int) -> None:
        middles = [(low + high) / 2 for low, high in zip(hist.edges, hist.edges[1:])]
        counts = [int(c) for c in hist.counts]
        if not sum(counts):
            return  # TensorBoard has no picture of nothing
        seen = [i for i, c in enumerate(counts) if c]
        self._writer.add_histogram_raw(
            name,
            min=hist.edges[seen[0]],
            max=hist.edges[seen[-1] + 1],
            num=sum(counts),
            sum=sum(c * m for c, m in zip(counts, middles)),
            sum_squares=sum(c * m * m for c, m in zip(counts, middles)),
            bucket_limits=list(hist.edges[1:]),  # right edges
            bucket_counts=counts,
            global_step=step,
        )
