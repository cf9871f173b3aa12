"""A profiled run is the run without a profiler, bit for bit; what it says about a machine without a GPU."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megasapo.geometry import read_geometry
from tests.e2e.runs import metrics, running, without_timing, write_config

PHASES = {"rollout", "batch", "old_logprobs", "update", "publish", "diagnose", "evaluate"}


def test_profile_and_model_flops(
    tmp_path: Path, settings: Callable[..., dict[str, Any]], task: Path, unbroken: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    asked = "train.profile={start: 3, stop: 4}"
    with running("train", config, asked, log=tmp_path / "log") as run:
        output = run.succeed()
    out = tmp_path / "run"
    assert without_timing(metrics(out)) == without_timing(metrics(unbroken))
    assert (out / "hf" / "model.safetensors").read_bytes() == (unbroken / "hf" / "model.safetensors").read_bytes()
    for said in ("no gpu/ figures of this run: it computes on the CPU", "no perf/mfu: the peak of a CPU is unknown"):
        assert output.count(said) == 1
    assert not [name for row in metrics(out) for name in row if name.startswith("gpu/") or name == "perf/mfu"]

    traces = {path.name: path for path in (out / "profile").iterdir()}
    assert set(traces) == {"step_3-4_rank_0.json.gz", "step_3-4_rank_1.json.gz"}
    for path in traces.values():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [e["name"] for e in events if e.get("ph") == "X" and e["cat"] == "user_annotation"]
        assert {name for name in names if name.startswith("step ")} == {"step 3", "step 4"}
        assert {name: names.count(name) for name in PHASES} == dict.fromkeys(PHASES, 2)
        assert names.count("save") == 1  # step 4's
        assert "aten::mm" in {e["name"] for e in events}

    geometry = read_geometry(task / "model")
    for row in metrics(out):
        rollouts = [
            json.loads(line)
            for path in (out / "rollouts").glob(f"step_{row['step']:08d}*")
            for line in path.read_text().splitlines()
        ]
        lengths = [len(r["prompt_ids"]) + len(r["output_ids"]) - 1 for r in rollouts]
        flops = geometry.training_flops(lengths, sum(len(r["output_ids"]) for r in rollouts))
        assert row["perf/update_tflop"] == pytest.approx(flops / 1e12, rel=1e-12)
        assert 0 < row["perf/old_logprobs_tflop"] < row["perf/update_tflop"] / 3
        assert row["perf/model_tflops"] == pytest.approx(flops / 1e12 / 2 / row["time/update_s"])
