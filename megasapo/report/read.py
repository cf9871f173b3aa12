"""Reads what a run directory holds into one record a run; what a run does not have is empty, never an error.

Called by the report's command. Knows file formats, nothing of charts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasapo import config as configuration
from megasapo import jsonl
from megasapo.errors import UserError
from megasapo.jsonl import Row
from megasapo.routing.store import read_diagnosis, read_tokens


@dataclass(frozen=True)
class Run:
    """One run as the report sees it."""

    label: str  # unique on the page
    path: Path
    config: dict[str, Any]  # config.yaml as it is: an older one may lack settings
    rows: list[Row]  # metrics.jsonl, one object a step, None for NaN
    finished: bool
    diagnoses: list[Row] = field(default_factory=list)  # routing/diagnosis/step_*.json, by step
    tokens: dict[str, list[Any]] = field(default_factory=dict)  # columns of the latest diagnosis's tokens
    tokens_step: int | None = None
    rollouts: dict[int, Row] = field(default_factory=dict)  # that step's samples by their uid in `tokens`
    events: list[Row] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def is_cold_start(self) -> bool:
        return "loss/sft" in self.rows[-1]

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of a dotted setting, the default where this run's config.yaml does not have it."""
        node: Any = self.config
        for part in name.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run, with labels that tell them apart. UserError names a directory that is not a run with steps."""
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{path} is given twice")
        seen[path.resolve()] = path
    configs = [_read_config(path) for path in paths]
    names = [str((config.get("run") or {}).get("name") or path.name) for path, config in zip(paths, configs)]
    labels = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names)]
    return [_read_run(path, config, label) for path, config, label in zip(paths, configs, labels)]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    if not (path / "metrics.jsonl").is_file():
        found = sorted(p.parent.name for p in path.glob("*/metrics.jsonl"))
        inside = f"; runs below it: {', '.join(found[:8])}" if found else ""
        raise UserError(f"{path} has no metrics.jsonl: not a run, or its log.sinks leaves out jsonl{inside}")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} has no config.yaml: give the directory that `megasapo train` made")
    return configuration.read(path / "config.yaml")


def _read_run(path: Path, config: dict[str, Any], label: str) -> Run:
    rows = jsonl.read(path / "metrics.jsonl")
    if not rows:
        raise UserError(f"{path / 'metrics.jsonl'} holds no step yet: wait for the first one")
    if not all("step" in row for row in rows):
        raise UserError(f"{path / 'metrics.jsonl'}: a line without a step: not written by megasapo, or damaged")
    diagnoses = [d for d in read_diagnosis(path) if d["tokens"]]  # one of empty responses has nothing to show
    tokens_step, tokens = _latest_tokens(path, diagnoses)
    group_size = int((config.get("rollout") or {}).get("group_size", 1))
    return Run(
        label=label,
        path=path,
        config=config,
        rows=rows,
        finished=(path / "done").exists(),
        diagnoses=diagnoses,
        tokens=tokens,
        tokens_step=tokens_step,
        rollouts={} if tokens_step is None else _read_rollouts(path, tokens_step, group_size, set(tokens["uid"])),
        events=jsonl.read(path / "events.jsonl"),
    )


def _latest_tokens(path: Path, diagnoses: list[Row]) -> tuple[int | None, dict[str, list[Any]]]:
    """Step and columns of the latest diagnosis that kept tokens (routing.diagnose_samples)."""
    for diagnosis in reversed(diagnoses):
        columns = read_tokens(path, diagnosis["step"])
        if len(columns.get("uid", ())):
            return diagnosis["step"], {name: column.tolist() for name, column in columns.items()}
    return None, {}


def _read_rollouts(path: Path, step: int, group_size: int, wanted: set[int]) -> dict[int, Row]:
    """Samples of a step by `group uid * group_size + index in the group`, as the learner names them."""
    found = {}
    for file in sorted((path / "rollouts").glob(f"step_{step:08d}*.jsonl")):
        for row in jsonl.read(file):
            uid = int(row["uid"]) * group_size + int(row["sample"])
            if uid in wanted:
                found[uid] = row
    return found
