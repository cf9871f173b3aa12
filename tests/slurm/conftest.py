"""One cluster for all these tests, and one run on it that nothing disturbed, with which the others are compared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import metrics, without_timing, write_config
from tests.slurm.cluster import Cluster, Job, running_cluster
from tests.tiny import make_model

STEPS, SAVE_EVERY = 6, 2
STANDS_AFTER = 3  # where a held run stands: one step after its last checkpoint, so that there is something to lose


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("no Slurm on this machine: tests/slurm/sandbox.sh install, or make test-slurm")
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster with all its nodes and no job, whatever the test before did."""
    yield slurm
    slurm.tidy()


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny MoE and problems."""
    root = tmp_path_factory.mktemp("task")
    make_model(root / "model", kind="moe", num_hidden_layers=2)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (root / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


class Experiment:
    """A directory with a configuration, and the run that comes of it."""

    def __init__(self, root: Path, task: Path) -> None:
        self.root, self.run = root, root / "run"
        self.config = str(write_config(root / "config.yaml", self._settings(task)))
        self._gate = root / "run.gate"

    def _settings(self, task: Path) -> dict[str, Any]:
        return {
            "run": {"name": "run", "dir": str(self.root)},
            "model": {"path": str(task / "model"), "dtype": "float32"},
            "data": {"train": str(task / "train.jsonl"), "max_prompt_tokens": 16},
            "reward": {
                "rewards": [{"name": "tests.slurm.gate:digit", "options": {"run": str(self.run)}}],
                "timeout_s": 600.0,
            },
            "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 12},
            "algo": {"mini_batches": 2},
            "optim": {"lr": 1e-3},
            "parallel": {"ep": 2},
            "train": {"steps": STEPS, "save_every": SAVE_EVERY, "micro_batch_tokens": 256},
        }

    def hold(self) -> None:
        self._gate.write_text(str(STANDS_AFTER))

    def stands(self, job: Job) -> bool:
        """Whether the attempt that runs now waits in the step after that one."""
        return (self.root / f"run.stands.{job.number}.{job.restarts()}").exists()

    def go_on(self) -> None:
        self._gate.unlink()

    def checkpoint(self) -> str | None:
        """The last one; None before the first."""
        latest = self.run / "checkpoints" / "latest"
        return latest.read_text() if latest.exists() else None

    def rows(self) -> list[dict[str, Any]]:
        return without_timing(metrics(self.run))


@pytest.fixture
def experiment(tmp_path: Path, task: Path) -> Experiment:
    return Experiment(tmp_path, task)


@pytest.fixture(scope="session")
def unbroken(slurm: Cluster, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A whole run on two learner nodes and one rollout node."""
    made = Experiment(tmp_path_factory.mktemp("unbroken"), task)
    slurm.submit(made.root, made.config).succeed()
    return made
