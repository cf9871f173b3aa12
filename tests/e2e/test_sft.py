"""`megasapo sft` from the command line: it learns, stops when asked, continues, exports, and knows when it is done."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.runs import metrics, running, steps_done, write_config


def test_a_cold_start_stops_continues_and_finishes(tmp_path: Path, task: Path) -> None:
    rows = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(8) for b in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {
        "run": {"name": "run", "dir": str(tmp_path)},
        "model": {"path": str(task / "model"), "dtype": "float32"},
        "sft": {"data": str(tmp_path / "data.jsonl"), "batch_size": 16, "max_tokens": 64, "epochs": 1000},
        "train": {"micro_batch_tokens": 64, "save_every": 1000},
        "optim": {"lr": 3e-3},
    }
    config, run_dir = write_config(tmp_path / "config.yaml", made), tmp_path / "run"
    with running("sft", config, log=tmp_path / "log") as run:
        run.until(lambda: steps_done(run_dir) >= 3, "the third step")
        (run_dir / "stop").touch()
        assert "stopped after step" in run.succeed()
    reached = steps_done(run_dir)
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{reached:08d}"
    more = reached // 4 + 2  # epochs of four steps
    with running("sft", config, f"sft.epochs={more}", log=tmp_path / "log") as run:
        run.succeed()
    losses = [row["loss/sft"] for row in metrics(run_dir)]
    assert len(losses) == 4 * more
    assert losses[-1] < 0.9 * losses[0]
    assert json.loads((run_dir / "done").read_text()) == {"command": "sft", "step": 4 * more}
    assert (run_dir / "hf" / "model.safetensors").is_file()
    with running("sft", config, "sft.epochs=1", log=tmp_path / "again") as run:  # it is further already
        assert "finished" in run.succeed()
