"""A batch of poisoned prompts in real runs: going back from it, ending at it, only warning of it; steps left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.runs import metrics, running, without_timing, write_config

PROMPTS_PER_STEP = 4
POISONED_STEP = 4
Settings = Callable[..., dict[str, Any]]
BELOW = {"metric": "reward/mean", "below": -100.0}


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems in file order: those of the fourth step are poisoned."""
    path = tmp_path_factory.mktemp("poisoned") / "train.jsonl"
    rows = [
        {"prompt": f"{i % 8}+{i // 8}=", "answer": "poison" if i // PROMPTS_PER_STEP == POISONED_STEP - 1 else "1"}
        for i in range(64)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def configure(where: Path, settings: Settings, data: Path, rules: list[Any], ranks: int, **more: Any) -> Path:
    where.mkdir(exist_ok=True)
    made = settings(where)
    made["data"] |= {"train": str(data), "shuffle": False}
    made["reward"] = {"rewards": [{"name": "tests.e2e.graders:digits_unless_poisoned"}]}
    made["rollout"] |= {"publish_verify": False}
    made["parallel"] = {"ep": ranks}
    made["train"] |= {"steps": 5, "keep_checkpoints": 9}
    made["stability"] = {"mode": "act", "rules": rules}
    for section, values in more.items():
        made[section] = made.get(section, {}) | values
    return write_config(where / "config.yaml", made)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def uids(rollouts: Path, files: str = "*") -> list[int]:
    return sorted({row["uid"] for path in rollouts.glob(files) for row in lines(path)})


def test_rollback_leaves_out_the_batches_that_led_there(tmp_path: Path, settings: Settings, poisoned: Path) -> None:
    config = configure(tmp_path, settings, poisoned, [BELOW | {"action": "rollback"}], ranks=1)
    with running("train", config, log=tmp_path / "log") as run:
        output = run.succeed()
    assert "rolled back to step 2: reward/mean = -1000 is below -100 at step 4" in output
    out = tmp_path / "run"
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert min(row["reward/mean"] for row in rows) >= 0
    undone = lines(out / "metrics.rolled_back.jsonl")
    assert [(row["rollback"], row["step"]) for row in undone] == [(1, 3), (1, 4)]
    assert undone[-1]["reward/mean"] == -1000
    assert [(e["step"], e["action"]) for e in lines(out / "events.jsonl")] == [(4, "rollback")]
    assert uids(out / "dumps" / "step_00000004" / "rollouts") == [12, 13, 14, 15]
    assert uids(out / "rollouts", "step_00000003*") == [16, 17, 18, 19]  # the data go on behind the poison

    # The checkpoint knows of the roll-back: resumed from it, a run goes the same way, bit for bit.
    other = tmp_path / "other" / "run"
    shutil.copytree(out, other)
    (other / "checkpoints" / "latest").write_text("step_00000002")
    (other / "done").unlink()
    with running("train", config, f"run.dir={other.parent}", log=tmp_path / "log2") as run:
        run.succeed()
    assert without_timing(metrics(other)) == without_timing(rows)
    assert (other / "hf" / "model.safetensors").read_bytes() == (out / "hf" / "model.safetensors").read_bytes()
    for name in ("events.jsonl", "metrics.rolled_back.jsonl"):
        assert (other / name).read_bytes() == (out / name).read_bytes()


def test_rollback_to_the_start_while_rollouts_are_in_flight(tmp_path: Path, settings: Settings, poisoned: Path) -> None:
    rollout = {"max_staleness": 2, "publish": "distributed", "deterministic": False}
    rules = [BELOW | {"action": "rollback"}]
    config = configure(tmp_path, settings, poisoned, rules, 2, rollout=rollout, train={"save_every": 50})
    with running("train", config, log=tmp_path / "log") as run:
        assert "rolled back to step 0" in run.succeed()
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert min(row["reward/mean"] for row in rows) >= 0
    assert [row["staleness/max"] for row in rows][:3] == [0, 1, 2]  # nothing of the undone versions is left
    assert uids(tmp_path / "run" / "rollouts", "step_00000001*") == [16, 17, 18, 19]
    dumped = tmp_path / "run" / "dumps" / "step_00000004" / "rollouts"
    assert sorted(p.name for p in dumped.iterdir()) == [f"step_00000004.part-{i}-of-2.jsonl" for i in (0, 1)]
    assert uids(dumped) == [12, 13, 14, 15]


def test_skip_leaves_the_weights_alone_stop_ends_the_run_and_warn_only_warns(
    tmp_path: Path, settings: Settings, poisoned: Path, task: Path
) -> None:
    rules = [{"metric": "grad/norm", "below": 1e9, "action": "skip"}, BELOW | {"action": "stop"}]
    more = {"train": {"save_every": 1}, "optim": {"schedule": "linear"}}
    config = configure(tmp_path, settings, poisoned, rules, ranks=1, **more)
    out = tmp_path / "run"
    with running("train", config, log=tmp_path / "log") as run:
        assert run.wait() == 2
    assert "step 4: reward/mean = -1000 is below -100" in run.output()
    assert "Traceback" not in run.output()
    assert (out / "checkpoints" / "latest").read_text() == "step_00000003"
    kept = out / "checkpoints" / "step_00000004.unstable"
    assert f"The state of this step is kept in {kept}" in run.output()
    assert json.loads((kept / "megasapo.json").read_text())["step"] == 4
    assert uids(out / "dumps" / "step_00000004" / "rollouts") == [12, 13, 14, 15]
    assert not (out / "done").exists()
    rows = metrics(out)
    assert [row["stability/skipped_steps"] for row in rows] == [2, 2, 2, 2]  # algo.mini_batches
    assert [row["grad/skipped_steps"] for row in rows] == [0, 0, 0, 0]
    assert rows[3]["optim/lr"] < rows[0]["optim/lr"]
    (served,) = (out / "weights" / "v4").glob("*.safetensors")
    before, after = load_file(task / "model" / "model.safetensors"), load_file(served)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)

    with running("train", config, "stability.mode=warn", log=tmp_path / "log2") as run:
        assert "step 4: reward/mean = -1000 is below -100: warn" in run.succeed()
    rows = metrics(out)
    assert ["stability/skipped_steps" in row for row in rows] == [True, True, True, False, False]
    assert [row["stability/events"] for row in rows] == [2, 2, 2, 2, 1]
    events = [(e["step"], e["metric"], e["action"]) for e in lines(out / "events.jsonl")]
    assert events[:6] == [(step, "grad/norm", "skip") for step in (1, 1, 2, 2, 3, 3)]
    assert sorted(events[6:]) == [(4, "grad/norm", "warn"), (4, "reward/mean", "warn"), (5, "grad/norm", "warn")]
