"""Which steps end up in a trace, and what it holds; tests/e2e/test_monitoring.py has a whole run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megasapo import run
from megasapo.config import ConfigError, from_dict
from megasapo.log.profile import Profiler
from megasapo.sections import ProfileSpec


def ranges(path: Path) -> list[str]:
    """Names of the ranges of a trace by their start, those of single operations left out."""
    with gzip.open(path) as f:
        events = json.load(f)["traceEvents"]
    marks = [e for e in events if e.get("ph") == "X" and e["cat"] == "user_annotation"]
    return [e["name"] for e in sorted(marks, key=lambda e: (e["ts"], -e["dur"]))]


def profiled(where: Path, spec: ProfileSpec | None, steps: list[int], rank: int = 0) -> dict[str, list[str]]:
    """The ranges of the traces of a loop over `steps`, by file name."""
    profiler = Profiler(spec, where, rank, torch.device("cpu"))
    phases = run.Phases(profiler.phase)
    for step in steps:
        profiler.at(step)
        for name in ("rollout", "update"):
            with phases(name):
                torch.ones(3).sum()
        assert {"time/rollout_s", "time/update_s", "time/step_s"} == phases.take().keys()
    profiler.close()
    profiler.close()
    return {path.name: ranges(path) for path in (where / "profile").glob("*")}


def in_steps(*steps: int) -> list[str]:
    return [name for step in steps for name in (f"step {step}", "rollout", "update")]


def test_a_trace_holds_its_steps_and_their_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ProfileSpec(start=2, stop=3)
    found = profiled(tmp_path, spec, [1, 2, 3, 4, 5])
    assert found == {"step_2-3_rank_0.json.gz": in_steps(2, 3)}
    assert capsys.readouterr().out == f"profile of steps 2 to 3: {tmp_path / 'profile'}\n"
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "step_2-3_rank_0.json.gz").read_bytes()))
    assert "aten::sum" in {event["name"] for event in trace["traceEvents"]}
    assert profiled(tmp_path, spec, [1, 2, 3], rank=7)["step_2-3_rank_7.json.gz"] == in_steps(2, 3)  # ends with the run
    assert capsys.readouterr().out == ""


def test_without_the_setting_nothing_is_written(tmp_path: Path) -> None:
    assert profiled(tmp_path, None, [1, 2]) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "found", "said"),
    [
        ([2], {"step_2-2_rank_0.json.gz": in_steps(2)}, ""),  # stopped in between
        (
            [3, 4, 5],
            {"step_3-4_rank_0.json.gz": in_steps(3, 4)},
            "train.profile.start=2, but the run goes on at step 3: only steps 3 to 4 are profiled",
        ),
        ([5, 6], {}, "train.profile.start=2, but the run goes on at step 5: nothing is profiled"),
        # rolled back to step 2 after step 3: as many steps as were asked for, and not again
        ([1, 2, 3, 3, 4, 5], {"step_2-3_rank_0.json.gz": in_steps(2, 3, 3)}, ""),
        ([1, 1, 2, 3, 4, 2, 3], {"step_2-4_rank_0.json.gz": in_steps(2, 3, 4)}, ""),
    ],
)
def test_runs_that_stop_resume_or_go_back(
    steps: list[int], found: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiled(tmp_path, ProfileSpec(start=2, stop=4), steps) == found
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("profile of")]
    assert lines == ([said] if said else [])


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        (3, 2, "start=3, stop=2: the last step comes before the first"),
        (3, 21, r"start=3, stop=21 is beyond train\.steps=20"),
        (5, 15, "start=5, stop=15 are 11 steps, .* at most 10"),
        (0, 2, r"train\.profile\.start=0"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(start: int, stop: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict({"model": {"path": "m"}, "train": {"steps": 20, "profile": {"start": start, "stop": stop}}})
    from_dict({"model": {"path": "m"}, "train": {"steps": 20, "profile": {"start": 11, "stop": 20}}})
