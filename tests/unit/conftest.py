"""Tiny models that several files of tests start embedded servers on, made once; nobody writes to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megasapo.rollout.fleet import Fleet
from megasapo.sections import RolloutConfig
from tests.tiny import make_model


@pytest.fixture(scope="session")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape: what servers start with, and what the learner has."""
    return [make_model(tmp_path_factory.mktemp(f"model{seed}"), seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="session")
def model_dir(dirs: list[Path]) -> Path:
    return dirs[0]


@pytest.fixture(scope="module")
def fleet(dirs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One embedded server, with the first of `dirs`."""
    cfg = RolloutConfig(server_args=("--threads", "1"), start_timeout_s=300.0, max_restarts=10)
    with Fleet.start(cfg, dirs[0], tmp_path_factory.mktemp("run")) as fleet:
        yield fleet
