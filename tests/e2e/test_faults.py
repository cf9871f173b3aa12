"""kill -9 of a learner, of the server, of both; SIGTERM: the run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import STEPS
from tests.e2e.runs import (
    TIMEOUT_S,
    Run,
    kill_hard,
    metrics,
    run_and_break,
    running,
    steps_done,
    without_timing,
    write_config,
)

Settings = Callable[..., dict[str, Any]]


def start_and_break(
    tmp_path: Path, settings: Settings, break_it: Callable[[Run], None], *changes: str
) -> tuple[Path, Run]:
    """A run to which something was done after its third step, and its configuration."""
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    where = {"run_dir": tmp_path / "run", "log": tmp_path / "log"}
    run, code = run_and_break(config, break_it, *changes, **where, before=STEPS - 1)
    assert (code == 0) == (tmp_path / "run" / "done").exists() or "stopped after step" in run.output()
    return config, run


def finish(tmp_path: Path, config: Path) -> None:
    with running("train", config, log=tmp_path / "log2") as run:
        run.succeed()


def assert_as_unbroken(run_dir: Path, unbroken: Path) -> None:
    rows, expected = without_timing(metrics(run_dir)), without_timing(metrics(unbroken))
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    for row, want in zip(rows, expected, strict=True):
        assert row == want, (
            f"step {row['step']}: { ({k: (row.get(k), want.get(k)) for k in want if row.get(k) != want[k]}) }"
        )
    assert json.loads((run_dir / "done").read_text()) == {"command": "train", "step": STEPS}
    model = "hf/model.safetensors"
    assert (run_dir / model).read_bytes() == (unbroken / model).read_bytes()


def test_an_uninterrupted_run_leaves_everything_in_its_place(unbroken: Path) -> None:
    assert (unbroken / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}"
    assert "api_key_file: null" in (unbroken / "config.yaml").read_text()
    key = (unbroken / "api_key").read_bytes()  # of both leaders, and nowhere else
    assert [p.name for p in unbroken.rglob("*") if p.is_file() and key in p.read_bytes()] == ["api_key"]
    assert (unbroken / "lock").read_text() == ""  # given back
    assert not (unbroken / "weights").exists()  # of the last step, as hf/
    assert list((unbroken / "tensorboard").glob("events.*"))
    assert len(list((unbroken / "rollouts").glob("step_*.jsonl"))) == 2 * STEPS  # one file a leader and step
    assert len(list((unbroken / "checkpoints").glob("step_*"))) == 2  # train.keep_checkpoints
    last = metrics(unbroken)[-1]
    for name in ("reward/mean", "reward/std", "loss/policy", "sapo/gate_mean_pos", "sapo/attenuated_frac", "ratio/ess"):
        assert name in last
    assert last["mismatch/logprob_abs_diff"] < 1e-5  # server and learner hold the same weights at every step
    assert last["staleness/max"] == 0


def test_kill_learner(tmp_path: Path, settings: Settings, unbroken: Path) -> None:
    config, run = start_and_break(tmp_path, settings, lambda r: kill_hard(r.ranks()[-1:]))
    assert not (tmp_path / "run" / "done").exists(), run.output()[-2000:]
    finish(tmp_path, config)
    assert_as_unbroken(tmp_path / "run", unbroken)


def test_kill_server_and_the_running_job_survives(tmp_path: Path, settings: Settings, unbroken: Path) -> None:
    _, run = start_and_break(tmp_path, settings, lambda r: kill_hard(r.servers()))
    assert (tmp_path / "run" / "done").exists(), run.output()[-3000:]
    assert sum(row["rollout/server_restarts"] for row in metrics(tmp_path / "run")) == 1
    assert_as_unbroken(tmp_path / "run", unbroken)


def test_a_run_without_any_server_left_saves_and_the_same_command_continues(
    tmp_path: Path, settings: Settings, unbroken: Path
) -> None:
    never_else = ("train.save_every=1000", "rollout.max_restarts=0")
    config, run = start_and_break(tmp_path, settings, lambda r: kill_hard(r.servers()), *never_else)
    reached = steps_done(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{reached:08d}", run.output()[-3000:]
    assert "rollout.max_restarts=0 times" in run.output()
    finish(tmp_path, config)
    assert_as_unbroken(tmp_path / "run", unbroken)


def test_a_step_whose_evaluation_fails_is_written_and_saved(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "held out"}) + "\n")
    made = settings(tmp_path)
    made["data"]["eval"] = str(tmp_path / "eval.jsonl")
    made["reward"] = {"rewards": [{"name": "tests.e2e.graders:digits_unless_held_out"}], "on_error": "error"}
    made["train"] |= {"steps": 3, "save_every": 1000, "eval_every": 2}
    with running("train", write_config(tmp_path / "config.yaml", made), log=tmp_path / "log") as run:
        assert run.wait() != 0
        assert "no grader for what is held out" in run.output()
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002"
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_a_grader_that_cannot_be_loaded_stops_the_run_before_its_model(tmp_path: Path, settings: Settings) -> None:
    made = settings(tmp_path) | {"reward": {"rewards": [{"name": "tests.e2e.graders:absent"}]}}
    with running("train", write_config(tmp_path / "config.yaml", made), log=tmp_path / "log") as run:
        assert run.wait() != 0
    output = run.output()
    assert "tests.e2e.graders:absent: cannot be loaded: AttributeError" in output
    assert "million parameters" not in output
    assert "waiting for rollout servers" not in output


def test_kill_everything(tmp_path: Path, settings: Settings, unbroken: Path) -> None:
    config, _ = start_and_break(tmp_path, settings, lambda r: kill_hard(r.processes()))
    finish(tmp_path, config)
    assert_as_unbroken(tmp_path / "run", unbroken)


def test_a_run_goes_on_in_another_layout(tmp_path: Path, settings: Settings, unbroken: Path) -> None:
    """The data where they were, by whatever number of ranks; metrics as before but for rounding."""
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / "done").unlink()
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000004")
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    with running("train", config, "parallel.ep=1", log=tmp_path / "log") as run:
        assert "is of another layout (world_size 2 -> 1, ep 2 -> 1)" in run.succeed()
    assert [path.name for path in (tmp_path / "run" / "rollouts").glob("step_00000005*")] == ["step_00000005.jsonl"]
    rows, expected = without_timing(metrics(tmp_path / "run")), without_timing(metrics(unbroken))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[:4] == expected[:4]
    for row, want in zip(rows[4:], expected[4:], strict=True):
        for name in ("reward/mean", "loss/policy", "grad/norm", "response/length_mean", "optim/lr"):
            assert row[name] == pytest.approx(want[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("stop", [Run.terminate, Run.interrupt])
def test_sigterm_and_ctrl_c_save_and_the_same_command_continues(
    stop: Callable[[Run], None], tmp_path: Path, settings: Settings, unbroken: Path
) -> None:
    config, run = start_and_break(tmp_path, settings, stop)
    reached = steps_done(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{reached:08d}", run.output()[-2000:]
    finish(tmp_path, config)
    assert_as_unbroken(tmp_path / "run", unbroken)


def test_ranks_whose_launcher_is_killed_save_and_the_same_command_continues(
    tmp_path: Path, settings: Settings, unbroken: Path
) -> None:
    def kill_launcher(run: Run) -> None:
        launcher, ranks = run.processes()[0], run.ranks()
        kill_hard([launcher])
        assert psutil.wait_procs(ranks, TIMEOUT_S)[1] == [], "they live on"

    config, run = start_and_break(tmp_path, settings, kill_launcher, "train.save_every=1000")
    reached = steps_done(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{reached:08d}", run.output()[-3000:]
    finish(tmp_path, config)
    assert_as_unbroken(tmp_path / "run", unbroken)


def test_ctrl_c_saves_where_one_process_is_all(tmp_path: Path, settings: Settings) -> None:
    start_and_break(tmp_path, settings, Run.interrupt, "parallel.ep=1", "train.steps=1000", "train.save_every=1000")
    reached = steps_done(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{reached:08d}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_twice_ends_at_once(ranks: int, tmp_path: Path, settings: Settings) -> None:
    """While it waits for servers that never come: what it would end by itself is far away."""
    made = settings(tmp_path)
    made["rollout"] |= {"engine": "sglang", "spawn_command": ["sleep", "100000"], "publish_verify": False}
    config = write_config(tmp_path / "config.yaml", made)
    with running("train", config, f"parallel.ep={ranks}", log=tmp_path / "log") as run:
        run.until(lambda: "waiting for rollout servers" in run.output(), "its servers")
        run.interrupt()
        run.until(lambda: "Ctrl-C again" in run.output(), "its answer")
        run.interrupt()
        assert run.wait() == 130, run.output()[-2000:]
    assert "stopped after step" not in run.output()
