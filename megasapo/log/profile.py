"""`train.profile`: traces of a few steps by torch's profiler, one file a rank, with the loop's phases as ranges.

Called by train.py. Every rank writes one: who waits for whom is only seen by comparing them, and a rank that alone were
profiled would slow the others' collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megasapo.sections import ProfileSpec


class Profiler:
    """`at` begins every step, `close` ends the last; between `spec.start` and `spec.stop` everything is recorded."""

    def __init__(self, spec: ProfileSpec | None, run_dir: Path, rank: int, device: torch.device) -> None:
        self._spec, self._directory, self._rank, self._device = spec, run_dir / "profile", rank, device
        self._profile: profile | None = None
        self._step_range: Any = None
        self._steps: list[int] = []  # that are in the trace; a roll-back repeats some

    def at(self, step: int) -> None:
        """Step `step` begins, and so the one before has ended."""
        if self._spec is None:
            return
        if self._profile is not None and len(self._steps) == self._spec.stop - self._steps[0] + 1:
            self.close()
            return
        if self._profile is None:
            if step < self._spec.start:
                return
            if step > self._spec.start:
                self._say_late(step)
            if step > self._spec.stop:
                self._spec = None
                return
            self._profile = _profile(self._device)
            self._profile.start()
        self._mark(step)

    def close(self) -> None:
        """The last step has ended: write what has been recorded, if anything."""
        if self._profile is None:
            return
        self._step_range.__exit__(None, None, None)
        self._profile.stop()
        path = self._directory / f"step_{self._steps[0]}-{self._steps[-1]}_rank_{self._rank}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        self._profile.export_chrome_trace(str(unfinished))
        unfinished.replace(path)
        self._profile = self._spec = None
        if self._rank == 0:
            print(f"profile of steps {self._steps[0]} to {self._steps[-1]}: {path.parent}", flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A range `name` in the trace; on a GPU its work is over when it ends, so that its seconds are its own."""
        with record_function(name):
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

    def _mark(self, step: int) -> None:
        if self._step_range is not None:
            self._step_range.__exit__(None, None, None)
        self._step_range = record_function(f"step {step}")
        self._step_range.__enter__()
        self._steps.append(step)

    def _say_late(self, step: int) -> None:
        assert self._spec is not None
        rest = f"only steps {step} to {self._spec.stop} are" if step <= self._spec.stop else "nothing is"
        if self._rank == 0:
            print(
                f"train.profile.start={self._spec.start}, but the run goes on at step {step}: {rest} profiled",
                flush=True,
            )


def _profile(device: torch.device) -> profile:
    # neither stacks nor shapes: the events of a step of a large model are many as they are
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"))
