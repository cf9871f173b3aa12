"""The bodies of the GPU tests on a CPU, in the local layer spec: what they do is right before a GPU has seen them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megasapo.mcore.topology import Topology
from megasapo.sections import ParallelConfig
from tests.gpu import checks
from tests.gpu.cases import Kind, Model, make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def topo() -> Iterator[Topology]:
    made = Topology.init(ParallelConfig())
    yield made
    made.destroy()


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_local_spec_agrees_with_fp32_and_that_with_transformers(
    kind: Kind, models: dict[Kind, Path], topo: Topology
) -> None:
    checks.spec_agrees(models[kind], topo, "local")


def test_replay_in_bfloat16(models: dict[Kind, Path], topo: Topology) -> None:
    checks.replay_holds(Model(models["moe"], topo, spec="local"), gradient_noise=0.0)


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
def test_policy_steps(replay: str, models: dict[Kind, Path], topo: Topology) -> None:
    checks.policy_steps(models["moe"], topo, {}, replay)
