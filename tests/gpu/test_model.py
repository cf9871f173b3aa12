"""The learner's model of Transformer Engine's layers: against the local spec and transformers, and under replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.needs import GPU, TE

if TYPE_CHECKING:
    from megasapo.mcore.topology import Topology
    from tests.gpu.cases import Kind

pytestmark = GPU
needs_te = TE[1]
# cuDNN's attention backward and the experts' scatter add in no particular order; in bfloat16 that is some 2^-8
NOISE = 0.02


@needs_te
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_te_spec_agrees_with_local_spec_and_transformers(kind: Kind, models: dict[Kind, Path], topo: Topology) -> None:
    from tests.gpu.checks import spec_agrees

    spec_agrees(models[kind], topo, "te")


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_local_spec_runs_on_the_gpu_too(kind: Kind, models: dict[Kind, Path], topo: Topology) -> None:
    from tests.gpu.checks import spec_agrees

    spec_agrees(models[kind], topo, "local")


@needs_te
def test_replay_under_te_grouped_experts(models: dict[Kind, Path], topo: Topology) -> None:
    from tests.gpu.cases import Model
    from tests.gpu.checks import replay_holds

    model = Model(models["moe"], topo, spec="te")
    experts = {type(layer.mlp.experts).__name__ for layer in model.chunks[0].decoder.layers}
    assert experts == {"TEGroupedMLP"}
    replay_holds(model, NOISE)


@needs_te
@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_policy_steps_under_replay(replay: str, models: dict[Kind, Path], topo: Topology) -> None:
    from tests.gpu.checks import policy_steps

    policy_steps(models["moe"], topo, {}, replay)


@needs_te
def test_fp32_is_left_to_the_local_spec(models: dict[Kind, Path], topo: Topology) -> None:
    """Transformer Engine attends in fp32 by whole score matrices only."""
    from megasapo.mcore.model import build_model, read_hf_config
    from megasapo.sections import ModelConfig

    for dtype, wanted in (("float32", False), ("bfloat16", True)):
        cfg = ModelConfig(path=str(models["dense"]), dtype=dtype)  # type: ignore[arg-type]
        (chunk,) = build_model(cfg, read_hf_config(models["dense"]), topo)
        assert chunk.outside.precision.use_te is wanted
