"""Other ways to run: own data, asynchronous rollouts over a broadcast, evaluation, a user's mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import metrics, running, without_timing, write_config

ROOT = Path(__file__).resolve().parents[2]
Settings = Callable[..., dict[str, Any]]


def test_a_users_own_word_problems_in_bfloat16(tmp_path: Path, settings: Settings) -> None:
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    changes = [
        f"data.train={ROOT / 'examples' / 'word_problems.jsonl'}",
        "data.max_prompt_tokens=200",
        "reward.rewards=[{name: math}, {name: format, weight: 0.5, options: {pattern: '.*[0-9].*'}}]",
        "parallel.ep=1",
        "train.steps=2",
        "train.export_every=1",
        "model.dtype=bfloat16",
        "rollout.publish_verify=false",  # the server keeps the file's float32
        "algo.objective=gspo",
    ]
    with running("train", config, *changes, log=tmp_path / "log") as run:
        run.succeed()
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2
    assert (tmp_path / "run" / "hf_00000001" / "model.safetensors").exists()
    assert {"reward/math", "reward/format", "ratio/clip_frac"} <= rows[0].keys()
    assert rows[-1]["grad/skipped_steps"] == 0
    assert 0 < rows[-1]["mismatch/logprob_abs_diff"] < 0.1
    line = json.loads((tmp_path / "run" / "rollouts" / "step_00000001.jsonl").read_text().splitlines()[0])
    assert any(word in line["prompt"] for word in ("How", "how", "What", "what"))


@pytest.mark.parametrize("publish", ["distributed", "tensor"])
def test_a_run_is_the_same_however_weights_are_published(
    tmp_path: Path, settings: Settings, unbroken: Path, publish: str
) -> None:
    """The unbroken run publishes to disk; samples are repeatable, so every metric is the same to the last bit."""
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    changes = [f"rollout.publish={publish}", "rollout.publish_bucket_mb=0.1", "train.steps=3", "train.save_every=3"]
    with running("train", config, *changes, log=tmp_path / "log") as run:
        run.succeed()
    assert not (tmp_path / "run" / "weights").exists()
    assert without_timing(metrics(tmp_path / "run")) == without_timing(metrics(unbroken))[:3]


def test_asynchronous_rollouts_over_a_broadcast(tmp_path: Path, settings: Settings) -> None:
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    changes = [
        "rollout.max_staleness=1",
        "rollout.publish=distributed",
        "rollout.deterministic=false",
        "rollout.drop_zero_variance=true",
        "rollout.oversample=1.25",
        "rollout.on_publish=abort",
        "algo.tis_cap=2.0",
        "train.eval_every=3",
        f"data.eval={tmp_path / 'eval.jsonl'}",
    ]
    (tmp_path / "eval.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "4"}\n')
    with running("train", config, *changes, log=tmp_path / "log") as run:
        run.succeed()
    rows = metrics(tmp_path / "run")
    assert rows[0]["staleness/max"] == 0
    assert max(r["staleness/max"] for r in rows) == 1
    kept = list((tmp_path / "run" / "in_flight").glob(f"step_{rows[-1]['step']:08d}.part-*-of-2.jsonl"))
    assert len(kept) == 2
    assert all(len(json.loads(line)["samples"]) == 4 for path in kept for line in path.read_text().splitlines())
    assert all(r["groups/zero_variance_frac"] == 0 for r in rows)
    assert "mismatch/correction_mean" in rows[0]
    assert "eval/pass@1" in rows[2]


def test_episodes_of_two_turns_are_learned_from_with_the_servers_routing(tmp_path: Path, settings: Settings) -> None:
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    changes = [
        "rollout.episode=tests.e2e.episodes:two_turns",
        "rollout.max_new_tokens=20",
        "algo.routing_replay=R3",
        "train.steps=2",
    ]
    with running("train", config, *changes, log=tmp_path / "log") as run:
        run.succeed()
    rows = metrics(tmp_path / "run")
    assert [r["response/turns_mean"] for r in rows] == [2, 2]
    assert [r["routing/native_frac"] for r in rows] == [0, 0]
    assert all(r["mismatch/logprob_abs_diff"] < 1e-5 for r in rows)
    lines = (tmp_path / "run" / "rollouts" / "step_00000001.part-0-of-2.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        given = [token for token, own in zip(row["output_ids"], row["sampled"], strict=True) if not own]
        assert given == [7, 8, 9]
        assert row["sampled"][0] == row["sampled"][-1] == 1
        assert [x for x, own in zip(row["logprobs"], row["sampled"], strict=True) if not own] == [0, 0, 0]


def test_evaluate_prints_and_writes_pass_at_k(tmp_path: Path, settings: Settings, task: Path) -> None:
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    changes = [f"data.eval={task / 'train.jsonl'}", "eval.max_problems=4", "eval.samples=3", "eval.k=[1,3]"]
    outputs = ["--out", str(tmp_path / "figures.json"), "--responses", str(tmp_path / "responses.jsonl")]
    with running("evaluate", config, *changes, *outputs, log=tmp_path / "log") as run:
        assert "pass@1" in run.succeed()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["problems"] == 4
    assert 0 <= figures["pass@1"] <= figures["pass@3"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [len(r["responses"]) for r in rows] == [3] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.stepz=3", "did you mean 'train.steps'?"),
        ("data.train=absent.jsonl", "data.train=absent.jsonl: no such file"),
        ("model.path=absent", "model.path=absent: no config.json there"),
        ("parallel.tp=0", "parallel.tp=0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, settings: Settings, change: str, words: str) -> None:
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    with running("train", config, change, log=tmp_path / "log") as run:
        assert run.wait() == 2
    assert words in run.output()
    assert "Traceback" not in run.output()
    assert not (tmp_path / "run").exists()


def test_bad_data_is_named_with_file_and_line(tmp_path: Path, settings: Settings) -> None:
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2="}\n')
    with running("train", config, f"data.train={bad}", "parallel.ep=1", log=tmp_path / "log") as run:
        assert run.wait() == 2
    assert f"{bad}:2" in run.output()
    assert "Traceback" not in run.output()


def test_more_kv_heads_than_the_layout_can_cut_are_refused(tmp_path: Path, settings: Settings) -> None:
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    with running("train", config, "parallel.tp=4", "parallel.ep=1", log=tmp_path / "log") as run:
        assert run.wait() != 0
    assert "num_key_value_heads=2" in run.output()


def test_emulated_fp8_learns_beside_a_plain_server(tmp_path: Path, settings: Settings) -> None:
    """The servers have the same weights unrounded: the difference shows, and ratios do not run away with it."""
    config = write_config(tmp_path / "config.yaml", settings(tmp_path))
    changes = ["precision.recipe=fp8_blockwise", "precision.emulate=true", "parallel.ep=1", "train.steps=2"]
    with running("train", config, *changes, log=tmp_path / "log") as run:
        run.succeed()
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2
    assert all(row["grad/skipped_steps"] == 0 for row in rows)
    assert all(0.005 < row["mismatch/logprob_abs_diff"] < 0.3 for row in rows)
