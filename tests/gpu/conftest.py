"""One process group, and tiny models, for all GPU tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megasapo.mcore.topology import Topology
    from tests.gpu.cases import Kind


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    from tests.gpu.cases import make_models

    return make_models(tmp_path_factory.mktemp("gpu_models"))


@pytest.fixture(scope="module")
def topo() -> Iterator[Topology]:
    from megasapo.mcore.topology import Topology
    from megasapo.sections import ParallelConfig

    made = Topology.init(ParallelConfig())
    yield made
    made.destroy()
