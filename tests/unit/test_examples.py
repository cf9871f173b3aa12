"""The ready configurations: loadable, possible on the GPUs they are for, and described with the planner's figures."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from megasapo import config, layout
from megasapo.geometry import read_geometry
from megasapo.plan import main as plan

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {  # parameters, active
    "qwen3_30b_a3b": (30.53e9, 3.35e9),
    "qwen3_235b_a22b": (235.09e9, 22.19e9),
    "deepseek_v3": (671.03e9, 37.55e9),
}
READY = sorted(path for name in FAMILIES for path in (ROOT / "examples" / name).glob("*.yaml"))


def load(path: Path, *overrides: str) -> config.Config:
    return config.load(path, [f"model.path={path.parent / 'geometry'}", *overrides])


def learner_gpus(path: Path) -> int:
    """As the sbatch line at the file's top says, which must agree with its name."""
    nodes, gpus = map(int, path.stem.split("_")[-1].split("x"))
    learners, allocated = map(int, re.search(r"LEARNER_NODES=(\d+) .*sbatch -N (\d+)", path.read_text()).groups())  # type: ignore[union-attr]
    assert allocated == nodes
    assert 0 < learners < nodes
    return learners * gpus


def test_all_are_there() -> None:
    names = [str(path.relative_to(ROOT / "examples")) for path in READY]
    assert names == [
        "deepseek_v3/bf16_96x8.yaml",
        "qwen3_235b_a22b/bf16_24x8.yaml",
        *(f"qwen3_30b_a3b/{name}.yaml" for name in ("bf16_2x8", "bf16_8x8", "fp8_2x8", "fp8_8x8")),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_geometry_is_the_models(name: str) -> None:
    directory = ROOT / "examples" / name / "geometry"
    count = read_geometry(directory).parameters()
    assert (count.total, count.active) == pytest.approx(FAMILIES[name], rel=1e-3)
    assert [p.name for p in directory.iterdir()] == ["config.json"]


@pytest.mark.parametrize("path", READY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_configuration(path: Path) -> None:
    cfg, gpus = load(path), learner_gpus(path)
    layout.check_run(cfg, gpus)
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    assert f"--context-length={longest}" in cfg.rollout.server_args, "servers must take the longest sequence"
    assert cfg.rollout.prompts_per_step * cfg.rollout.group_size // cfg.algo.mini_batches >= gpus
    fp8 = path.stem.startswith("fp8")
    assert cfg.precision.quantises == fp8
    assert (cfg.rollout.quantization == "fp8_block") == (fp8 or "deepseek" in cfg.run.name), (
        "too large for bf16 servers"
    )
    heads = re.findall(r"#   (?:.* )?(?:slurm/sapo_moe.sh|megasapo plan) (\S+)", path.read_text())
    assert heads == [str(path.relative_to(ROOT))] * 2
    for name in set(re.findall(r"\b(?:bf16|fp8)_\d+x8\.yaml", path.read_text())):
        assert (path.parent / name).is_file()


def test_run_names_differ() -> None:
    names = [load(path).run.name for path in READY]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", READY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_command_at_the_top_says_that_it_fits(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = re.search(r"#   megasapo plan (.*)", path.read_text())
    assert command is not None
    assert plan([*shlex.split(command[1]), "--top", "0"]) == 0
    assert ", fits;" in capsys.readouterr().out
    assert f"--gpus {learner_gpus(path)} " in command[1]


@dataclass(frozen=True)
class Row:
    """One of a README's table."""

    path: Path
    overrides: tuple[str, ...]
    gpus: int
    gpu: str
    degrees: dict[str, int]
    recompute: str
    gib: float
    room: int
    seconds: int


def rows() -> list[Row]:
    pattern = (
        r"\| `(\S+\.yaml)([^`]*)` \| (\d+) \+ \d+ \| (\d+) (h\d00) \| (.*), (none|selective|full) "
        r"\| ([\d.]+) of (\d+) GiB \| (\d+) s \|"
    )
    found = []
    for name in FAMILIES:
        readme = (ROOT / "examples" / name / "README.md").read_text()
        for file, overrides, nodes, gpus, gpu, degrees, recompute, gib, room, seconds in re.findall(pattern, readme):
            assert int(nodes) * 8 == int(gpus)
            found.append(
                Row(
                    *(ROOT / "examples" / name / file, tuple(overrides.split()), int(gpus), gpu),
                    *({k: int(v) for k, v in (d.split() for d in degrees.split(", "))}, recompute),
                    *(float(gib), int(room), int(seconds)),
                )
            )
    return found


def test_every_configuration_has_a_row() -> None:
    assert {row.path for row in rows()} == set(READY)
    assert len(rows()) == 14


@pytest.mark.parametrize("row", rows(), ids=lambda r: f"{r.path.stem}-{r.gpus}{r.gpu}-{'-'.join(r.overrides)}")
def test_readme_has_the_planners_figures(row: Row, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"model.path={row.path.parent / 'geometry'}", *row.overrides]
    cluster = ["--gpus", str(row.gpus), "--gpu", row.gpu, "--top", "0", "--json"]
    assert plan([str(row.path), *overrides, *cluster]) == 0
    said = json.loads(capsys.readouterr().out)["layout"]
    assert {name: said[name] for name in ("tp", "cp", "pp", "ep") if said[name] > 1} == row.degrees
    assert said["recompute"] == row.recompute
    assert round(said["memory_bytes"]["total"] / 2**30, 1) == row.gib < row.room
    assert round(said["seconds"]) == row.seconds
