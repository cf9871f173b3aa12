"""A step of the ready configurations with a tiny model of the same family on two ranks, and what `watch` says of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megasapo import config
from tests.e2e.runs import metrics, running, write_config
from tests.tiny import make_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# what two ranks leave of each layout
SHRUNK = {
    "qwen3_30b_a3b/bf16_2x8.yaml": {"tp": 2, "ep": 2},
    "qwen3_30b_a3b/fp8_8x8.yaml": {"cp": 2, "ep": 2},
    "qwen3_235b_a22b/bf16_24x8.yaml": {"pp": 2},
    "deepseek_v3/bf16_96x8.yaml": {"tp": 2, "ep": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "qwen3", kind="moe", dtype=torch.bfloat16)
    make_model(root / "deepseek", kind="deepseek_v3", dtype=torch.bfloat16)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def documented() -> str:
    """A pattern of the names in docs/monitoring.md's table of figures; words in capitals stand for any."""
    text = (EXAMPLES.parent / "docs" / "monitoring.md").read_text()
    table = text.partition("## What every figure means")[2].partition("## ")[0]
    names = re.findall(r"`(\w+/[\w@]+)`", "".join(line for line in table.splitlines(True) if line.startswith("| `")))
    assert len(names) > 30
    return "|".join(re.sub("[A-Z]{2,}|K$", r"[\\w/]+", name) for name in names)


@pytest.mark.parametrize("name", SHRUNK)
def test_a_step_of_it(name: str, tiny: Path, tmp_path: Path) -> None:
    cfg = config.load(EXAMPLES / name)
    settings = cfg.model_dump(mode="json", exclude_unset=True)
    for degree, size in SHRUNK[name].items():
        assert settings["parallel"][degree] >= size
    settings["run"]["dir"] = str(tmp_path)
    settings["model"]["path"] = str(tiny / name.split("_")[0])
    settings["data"] |= {"train": str(tiny / "data.jsonl"), "eval": str(tiny / "data.jsonl"), "max_prompt_tokens": 48}
    settings["rollout"] |= {"engine": "embedded", "server_args": [], "prompts_per_step": 4, "group_size": 4}
    settings["rollout"] |= {"max_new_tokens": 12, "publish_bucket_mb": 1.0}
    settings["parallel"] = SHRUNK[name]
    settings["train"] |= {"steps": 1, "micro_batch_tokens": 256, "eval_every": 1}
    settings["eval"]["max_problems"] = 4
    settings["routing"]["diagnose_every"] = 1
    settings |= {"precision": settings["precision"] | {"emulate": True}} if cfg.precision.quantises else {}
    with running("train", write_config(tmp_path / "config.yaml", settings), log=tmp_path / "log") as run:
        run.succeed()
    out = tmp_path / cfg.run.name
    (row,) = metrics(out)
    assert {"reward/mean", "eval/pass@1", "routing/var_share_update"} <= row.keys()
    assert [name for name in row if name != "step" and not re.fullmatch(documented(), name)] == []
    _check_watch(out)


def _check_watch(out: Path) -> None:
    command = [sys.executable, "-m", "megasapo.cli", "watch", str(out), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FINISHED: `megasapo train` reached step 1" in done.stdout
    assert "step 1/1 [##############################] 100%" in done.stdout
    signs = [json.loads((out / "logs" / "ranks" / f"rank_{n}.json").read_text()) for n in range(2)]
    assert [(s["state"], s["step"], s["total"], s["world"]) for s in signs] == [("ended", 1, 1, 2)] * 2
    servers = json.loads((out / "logs" / "servers.json").read_text())["servers"]
    assert len(servers) == 1
