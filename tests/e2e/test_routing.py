"""Runs that replay, trace and explain the server's routing; the trace of one that is killed is that of one run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megasapo.routing.scored import TERMS, TERMS_WITH_FP8
from megasapo.routing.store import read_diagnosis, read_tokens
from megasapo.routing.trace import is_traced, read_trace
from tests.e2e.runs import kill_hard, metrics, run_and_break, running, write_config

ROOT = Path(__file__).resolve().parents[2]
STEPS, GROUPS, SIZE, RATE = 4, 4, 4, 0.5
LEADERS, IN_FLIGHT = 2, 8


def test_the_trace_of_a_killed_run_has_every_sample_once(
    tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    own = {
        "algo": {"mini_batches": 2, "routing_replay": "R3"},
        "routing": {"trace_rate": RATE, "diagnose_every": 2},
        "train": {"steps": STEPS, "save_every": 2, "micro_batch_tokens": 256},
    }
    config = write_config(tmp_path / "config.yaml", settings(tmp_path) | own)
    where = {"run_dir": tmp_path / "run", "log": tmp_path / "log"}
    run_and_break(config, lambda run: kill_hard(run.ranks()), **where, before=STEPS)
    with running("train", config, log=tmp_path / "log2") as run:
        run.succeed()

    rows = read_trace(tmp_path / "run" / "routing" / "trace")
    drawn = [(step, (step - 1) * GROUPS * SIZE + i) for step in range(1, STEPS + 1) for i in range(GROUPS * SIZE)]
    expected = [(step, uid) for step, uid in drawn if is_traced(uid, RATE, seed=1)]
    assert [(step, r.uid) for step, r in rows if r.source == "rollout"] == expected

    learner = [(step, r.uid, r.version_min) for step, r in rows if r.source == "learner"]
    assert learner == [(step, uid, v) for step, uid in expected if step % 2 == 0 for v in (step - 1, step)]
    # in fp32 server and learner choose the same experts with the same weights
    one = {(step, r.uid): r.routing for step, r in rows if r.source == "rollout"}
    for step, r in rows:
        if r.source == "learner" and r.version_min == step - 1:
            np.testing.assert_array_equal(np.sort(r.routing), np.sort(one[step, r.uid]))
    for line in metrics(tmp_path / "run"):
        assert line["routing/native_frac"] == 0
        assert line["routing/trace_dropped"] == 0


@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_the_example_tells_all_four_causes_apart(
    replay: str, tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    """examples/arithmetic/routing.yaml, on a smaller model and for a few steps."""
    example = yaml.safe_load((ROOT / "examples" / "arithmetic" / "routing.yaml").read_text())
    own = settings(tmp_path)
    example |= {name: own[name] for name in ("run", "model", "data", "reward", "optim")}
    # few requests at once: only those in flight when version 2 arrives are of two versions, however slow the machine
    example["rollout"] |= {"prompts_per_step": 16, "group_size": 4, "max_new_tokens": 12, "max_in_flight": IN_FLIGHT}
    example["train"] = {"steps": 3, "save_every": 3, "micro_batch_tokens": 512}
    example["algo"]["routing_replay"] = replay
    example["routing"]["diagnose_every"] = 3
    with running("train", write_config(tmp_path / "config.yaml", example), log=tmp_path / "log") as run:
        run.succeed()
    first, _, last = metrics(tmp_path / "run")
    assert first["grad/norm"] > 0
    assert last["staleness/max"] <= 1
    shares = [last[f"routing/var_share_{term}"] for term in TERMS]
    assert sum(shares) == pytest.approx(1, abs=1e-9)
    for term in TERMS:
        assert last[f"routing/var_{term}"] > 0, f"{term} of {dict(zip(TERMS, shares, strict=True))}"
    assert last["routing/flip_rate_mismatch"] > 0
    assert last["routing/flip_rate_drift"] > 0
    (diagnosis,) = read_diagnosis(tmp_path / "run")
    # drawn with version 1, or 2 when the server is slow; those that saw a new version on the way are left out
    assert diagnosis["behaviour_version"] in (1, 2)
    assert diagnosis["current_version"] == 3
    whole = 16 * 4 - LEADERS * IN_FLIGHT
    assert whole / 2 <= diagnosis["sequences"] <= 64
    for term in ("mismatch", "drift"):
        assert sum(diagnosis["sweep"]["share"][term]) == pytest.approx(diagnosis["share"][term], abs=1e-6)
    subprocess.run([sys.executable, "-m", "megasapo.cli", "report", str(tmp_path / "run")], check=True, timeout=300)
    assert "mismatch" in (tmp_path / "run" / "report.html").read_text()


def test_fp8_in_the_learner_is_told_apart_from_the_engine(
    tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    """Server and learner compute in fp32, so without quantisation they agree; the debugger finds the same."""
    own = settings(tmp_path)
    own["algo"] |= {"routing_replay": "R3"}
    own |= {
        "precision": {"recipe": "fp8_blockwise", "emulate": True},
        "routing": {"trace_rate": 1, "diagnose_every": 2, "diagnose_sweep": 2},
        "train": {"steps": 2, "save_every": 1, "micro_batch_tokens": 256},
    }
    with running("train", write_config(tmp_path / "config.yaml", own), log=tmp_path / "log") as run:
        run.succeed()
    _, last = metrics(tmp_path / "run")
    assert sum(last[f"routing/var_share_{term}"] for term in TERMS_WITH_FP8) == pytest.approx(1, abs=1e-9)
    assert last["routing/var_engine"] < 1e-9 < 1e-6 < last["routing/var_fp8"]
    assert last["routing/var_update"] > 1e-6
    (diagnosis,) = read_diagnosis(tmp_path / "run")
    assert diagnosis["terms"] == list(diagnosis["share"]) == list(TERMS_WITH_FP8)
    subprocess.run([sys.executable, "-m", "megasapo.cli", "report", str(tmp_path / "run")], check=True, timeout=300)
    assert "Variance that FP8 adds" in (tmp_path / "run" / "report.html").read_text()

    out = tmp_path / "debug.json"
    arguments = ("--step", "2", "--unquantised", "--json", str(out))
    with running("debug", tmp_path / "run", *arguments, log=tmp_path / "debug") as run:
        run.succeed()
    found = json.loads(out.read_text())
    rows = {row["variant"]: row for row in found["overall"]["variants"]}
    assert rows["unquantised R3"]["max"] < 1e-4 < 1e-3 < rows["R3"]["mean"]
    assert list(found["overall"]["terms"]["terms"]) == ["engine", "fp8", "mismatch"]
    # what one rank finds with the checkpoint is what two ranks found while they trained
    tokens = read_tokens(tmp_path / "run", 2)
    told = {
        (s["uid"], t["position"]): t["logprob"] - t["unquantised_logprob"] for s in found["samples"] for t in s["fp8"]
    }
    again = [told[uid, position] for uid, position in zip(tokens["uid"].tolist(), tokens["position"].tolist())]
    assert len(again) > 20
    np.testing.assert_allclose(again, tokens["fp8"], atol=1e-4)
