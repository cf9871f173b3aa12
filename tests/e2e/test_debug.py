"""The replay debugger on a run that was really trained: its dump, and its checkpoints, which two ranks wrote."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.runs import running


def test_the_learner_agrees_with_the_server_until_the_weights_move(unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ("--step", "5", "--limit", "6", "--weights", "6", "--json", str(out))
    with running("debug", unbroken, *arguments, log=tmp_path / "log") as run:
        text = run.succeed()
    found = json.loads(out.read_text())
    assert "6 of 16 samples" in text
    # one rank scores with what two ranks of expert parallelism saved, as the server sampled
    assert [Path(path).name for path in found["weights"]] == ["step_00000004"]
    rows = {row["variant"]: row for row in found["overall"]["variants"]}
    assert rows["native"]["tokens"] > 6
    assert rows["native"]["max"] < 1e-4
    assert rows["R2"]["max"] < 1e-4
    # two optimizer steps later
    assert rows["current native"]["mean"] > 1e-3
    assert rows["current native"]["mean"] < 5
    assert found["overall"]["terms"]["terms"]["update"]["variance"] > 1e-6
