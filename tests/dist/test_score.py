"""`megasapo score` as a user runs it: the command, its ranks, its files; numbers against transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megasapo.data.files import DataError
from megasapo.geometry import read_geometry
from megasapo.score import read_lines
from tests.dist.launcher import ROOT
from tests.tiny import make_model

LENGTHS = (5, 1, 17, 33, 2, 64, 9, 30, 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "moe")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "in.jsonl"
    path.write_text("".join(json.dumps({"input_ids": random.integers(0, 512, n).tolist()}) + "\n" for n in LENGTHS))
    return path


def run_score(*args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megasapo.cli", "score", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def check(out: Path, model: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    scored = [json.loads(line)["logprobs"] for line in out.read_text().splitlines()]
    assert [len(row) for row in scored] == [n - 1 for n in LENGTHS]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for line, row in zip(data.read_text().splitlines(), scored, strict=True):
        ids = torch.tensor(json.loads(line)["input_ids"])
        with torch.no_grad():
            log_probs = reference(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row), expected, rtol=0, atol=1e-4)


FOUR_PACKS = ("train.micro_batch_tokens=100", "data.max_prompt_tokens=50", "rollout.max_new_tokens=50")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["parallel.pp=2", "--nproc", "2"], id="pp2"),
        pytest.param(
            ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "--nproc", "8"], marks=pytest.mark.slow, id="tp2pp2ep2"
        ),
    ],
)
def test_score_agrees_with_transformers(layout: list[str], model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = run_score("--model", str(model), "--data", str(data), "--out", str(out), *layout, *FOUR_PACKS)
    assert done.returncode == 0, done.stderr[-4000:]
    check(out, model, data)


def test_a_given_routing_is_forced(model: Path, data: Path, tmp_path: Path) -> None:
    """Its own routing changes nothing; another one changes what comes after it, and nothing before."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    files = ["--model", str(model), "--routing"]
    done = run_score(*files, "--data", str(data), "--out", str(first))
    assert done.returncode == 0, done.stderr[-4000:]
    natural = [json.loads(line) for line in first.read_text().splitlines()]
    assert [np.shape(row["routing"]) for row in natural if row["routing"]] == [(n - 1, 4, 2) for n in LENGTHS if n > 1]
    changed, layer, at = 3, 2, 10  # line, layer and token whose experts become others
    forced = [row["routing"] for row in natural]
    forced[changed][at][layer] = [(expert + 4) % 8 for expert in forced[changed][at][layer]]
    forced[5] = forced[5][:20]  # the rest is left to the routers
    forced[6] = [[[-1, -1]] * 4] * (LENGTHS[6] - 1)
    again = tmp_path / "again.jsonl"
    rows = zip(data.read_text().splitlines(), forced, strict=True)
    again.write_text("".join(json.dumps(json.loads(line) | {"routing": z}) + "\n" for line, z in rows))
    done = run_score(*files, "--data", str(again), "--out", str(second))
    assert done.returncode == 0, done.stderr[-4000:]
    scored = [json.loads(line) for line in second.read_text().splitlines()]
    for i, (before, after) in enumerate(zip(natural, scored, strict=True)):
        difference = np.abs(np.subtract(before["logprobs"], after["logprobs"]))
        if i == changed:
            assert difference[:at].max() < 1e-5 < 1e-3 < difference[at]
            assert after["routing"][at][layer] == forced[changed][at][layer]
        else:
            assert difference.max(initial=0) < 1e-5
            assert after["routing"] == before["routing"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input_ids": [1, 2', "in.jsonl:2: not valid JSON"),
        ('{"tokens": [1, 2]}', "in.jsonl:2: input_ids must be a list of at least one integer, found None"),
        ('{"input_ids": []}', "in.jsonl:2: input_ids must be a list"),
        ('{"input_ids": [1, true]}', "in.jsonl:2: input_ids must be a list"),
        ('{"input_ids": [1, 512]}', "in.jsonl:2: token id 512 is outside the model's vocabulary of 512"),
        ('{"input_ids": [-1, 5]}', "in.jsonl:2: token id -1 is outside"),
        (
            '{"input_ids": [1, 2], "routing": [[[0, 1]]]}',
            "[at most 1 tokens][4 MoE layers][2 experts], found int64 [1, 1,",
        ),
        ('{"input_ids": [1, 2], "routing": [[[0, 1], [2]]]}', "in.jsonl:2: routing must be [at most 1 tokens]"),
        (
            '{"input_ids": [1, 2, 3], "routing": [[[0, 1], [0, 1], [2, 3], [3, 8]]]}',
            "in.jsonl:2: routing of token 0 in layer 3 is [3, 8]: expected 2 different experts from 0 to 7",
        ),
        (
            '{"input_ids": [1, 2], "routing": [[[-1, -1], [4, 4], [2, 3], [3, 7]]]}',
            "in.jsonl:2: routing of token 0 in layer 1 is [4, 4]: expected 2 different",
        ),
    ],
)
def test_malformed_lines_are_named(line: str, message: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"input_ids": [1, 2]}\n' + line + "\n")
    with pytest.raises(DataError, match=re.escape(message)):
        read_lines(path, read_geometry(model))


def test_mistakes_are_one_line_and_leave_no_file(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    files = ["--model", str(model), "--data", str(data), "--out", str(out)]
    for extra, message in [
        (["parallel.tp=2", "--nproc", "3"], "tp(2)*pp(1)*cp(1)=2 does not divide world size 3; start a multiple of 2"),
        (["parallel.tq=2"], "did you mean 'parallel.tp'"),
        (["--model", str(tmp_path)], "no config.json"),
        (["--data", str(tmp_path / "absent")], "absent: no such data file"),
    ]:
        done = run_score(*files, *extra)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not out.exists()
