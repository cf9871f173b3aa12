"""A run that replays, traces and explains the server's routing, killed in the middle: its trace is that of one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megasapo.routing.trace import is_traced, read_trace
from tests.e2e.runs import kill_hard, metrics, running, steps_done, write_config

STEPS, GROUPS, SIZE, RATE = 4, 4, 4, 0.5


def test_the_trace_of_a_killed_run_has_every_sample_once(
    tmp_path: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    own = {
        "algo": {"mini_batches": 2, "routing_replay": "R3"},
        "routing": {"trace_rate": RATE, "diagnose_every": 2},
        "train": {"steps": STEPS, "save_every": 2, "micro_batch_tokens": 256},
    }
    config = write_config(tmp_path / "config.yaml", settings(tmp_path) | own)
    with running("train", config, log=tmp_path / "log") as run:
        run.until(lambda: steps_done(tmp_path / "run") >= 3, "the third step")
        kill_hard(run.ranks())
        run.wait()
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
