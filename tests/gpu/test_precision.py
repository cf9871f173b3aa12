"""FP8 in the learner on this device: each recipe takes finite steps or is refused, and does what its settings say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.needs import GPU, TE, cannot_run

if TYPE_CHECKING:
    from megasapo.mcore.topology import Topology
    from tests.gpu.cases import Kind

pytestmark = GPU
needs_te = TE[1]
RECIPES = ["fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"]
KINDS = ["moe", "dense"]


def skip_unless_it_runs(recipe: str) -> None:
    if reason := cannot_run(recipe):
        pytest.skip(f"{recipe}: {reason}")


@needs_te
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_that_the_device_lacks_is_refused(recipe: str, models: dict[Kind, Path], topo: Topology) -> None:
    from megasapo.config import ConfigError
    from megasapo.mcore.precision import refuse_unusable
    from megasapo.sections import PrecisionConfig
    from tests.gpu.cases import Model

    quantised = PrecisionConfig(recipe=recipe)
    if not cannot_run(recipe):
        refuse_unusable(quantised)
        return
    with pytest.raises(ConfigError, match=f"precision.recipe={recipe}"):
        refuse_unusable(quantised)
    with pytest.raises(ConfigError, match=f"precision.recipe={recipe}"):
        Model(models["moe"], topo, spec="te", quantised=quantised)


@needs_te
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_steps_are_finite(recipe: str, kind: Kind, models: dict[Kind, Path], topo: Topology) -> None:
    from tests.gpu.checks import policy_steps

    skip_unless_it_runs(recipe)
    policy_steps(models[kind], topo, {"recipe": recipe})


@needs_te
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_rounding_is_seen_and_can_be_switched_off(
    recipe: str, kind: Kind, models: dict[Kind, Path], topo: Topology
) -> None:
    from megasapo.sections import PrecisionConfig
    from tests.gpu.checks import rounding_is_seen

    skip_unless_it_runs(recipe)
    rounding_is_seen(models[kind], topo, PrecisionConfig(recipe=recipe), "te")


@needs_te
@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "fp8_blockwise", "mxfp8"])
def test_first_layers_stay_in_bfloat16(recipe: str, models: dict[Kind, Path], topo: Topology) -> None:
    from megasapo.sections import PrecisionConfig
    from tests.gpu.checks import outer_layers_are_plain

    skip_unless_it_runs(recipe)
    outer_layers_are_plain(models["moe"], topo, PrecisionConfig(recipe=recipe, first_layers_bf16=1), "te")


@needs_te
@pytest.mark.parametrize("recipe", ["fp8_delayed", "fp8_tensorwise", "fp8_blockwise"])
def test_fp8_parameters_hold_the_models_weights(recipe: str, models: dict[Kind, Path], topo: Topology) -> None:
    from tests.gpu.checks import fp8_parameters_hold

    skip_unless_it_runs(recipe)
    fp8_parameters_hold(models["moe"], topo, recipe)


@needs_te
@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_fp8_steps_under_replay(replay: str, models: dict[Kind, Path], topo: Topology) -> None:
    from tests.gpu.checks import policy_steps

    skip_unless_it_runs("fp8_blockwise")
    policy_steps(models["moe"], topo, {"recipe": "fp8_blockwise"}, replay)


@needs_te
@pytest.mark.parametrize("recipe", RECIPES)
def test_emulation_is_the_real_thing(recipe: str, models: dict[Kind, Path], topo: Topology) -> None:
    from tests.gpu.checks import emulation_agrees

    skip_unless_it_runs(recipe)
    emulation_agrees(models["dense"], topo, recipe)


def test_emulated_steps_are_finite_on_the_gpu(models: dict[Kind, Path], topo: Topology) -> None:
    from tests.gpu.checks import policy_steps

    emulated: dict[str, Any] = {"recipe": "fp8_blockwise", "emulate": True}
    policy_steps(models["moe"], topo, emulated)
