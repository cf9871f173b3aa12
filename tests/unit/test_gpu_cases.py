"""The bodies of the GPU tests on a CPU, in the local layer spec: what they do is right before a GPU has seen them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from megasapo.mcore import checkpoint
from megasapo.mcore.topology import Topology
from megasapo.sections import ParallelConfig, PrecisionConfig
from tests.gpu import checks
from tests.gpu.cases import Kind, Model, make_models, relative
from tests.gpu.quick_run import assert_healthy, quick_run
from tests.gpu.sides import assert_carried_over, run_side

Recipe = Literal["fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"]


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


def test_checkpoints_are_named_as_those_of_transformer_engines_layers(models: dict[Kind, Path], topo: Topology) -> None:
    """Whose norms belong to the linear layers after them, but not to a router (test_te_spec.py compares the two)."""

    def norms(kind: Kind) -> set[str]:
        keys = Model(models[kind], topo, spec="local").chunks[0].sharded_state_dict()
        found = (re.match(r"decoder\.layers\.(?:\d+\.)?(.*norm.*)", value.key) for value in keys.values())
        return {match[1] for match in found if match}

    attention = {"self_attention.linear_qkv.layer_norm_weight"}
    attention |= {f"self_attention.{x}_layernorm.weight" for x in "qk"}
    assert norms("moe") == attention | {"pre_mlp_layernorm.weight"}
    assert norms("dense") == attention | {"mlp.linear_fc1.layer_norm_weight"}


def test_passes_without_gradient_keep_the_histories_of_transformer_engine(
    models: dict[Kind, Path], topo: Topology
) -> None:
    """Its modules note the largest values of such passes, too, in the first row of what the next scales come from."""
    model = Model(models["dense"], topo, spec="local")
    noting = model.chunks[0].decoder.layers[0].mlp
    history = torch.tensor([[2.0, 1.0], [9.0, 9.0]])
    noting.fp8_meta = {"scaling_fwd": SimpleNamespace(amax_history=history)}
    seen = []

    def note(*_: object) -> None:
        history[0] = 100.0
        seen.append(True)

    noting.register_forward_hook(note)
    model.logprobs()
    assert seen
    torch.testing.assert_close(history[0], torch.tensor([2.0, 1.0]), rtol=0, atol=0)


def test_replay_in_bfloat16(models: dict[Kind, Path], topo: Topology) -> None:
    checks.replay_holds(Model(models["moe"], topo, spec="local"), gradient_noise=0.0)


@pytest.mark.parametrize("replay", ["none", "R2", "R3"])
def test_policy_steps(replay: str, models: dict[Kind, Path], topo: Topology) -> None:
    checks.policy_steps(models["moe"], topo, {}, replay)


RECIPES = ["fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_emulated_recipes(recipe: Recipe, models: dict[Kind, Path], topo: Topology) -> None:
    emulated = PrecisionConfig(recipe=recipe, emulate=True)
    checks.rounding_is_seen(models["moe"], topo, emulated, "local")
    plain, rounded = (
        checks.projection(Model(models["dense"], topo, spec="local", quantised=q)) for q in (None, emulated)
    )
    for what, wanted in plain.items():
        assert 0.005 < relative(rounded[what], wanted) < 0.1, f"{recipe}: {what}"


def test_emulated_steps_and_outer_layers(models: dict[Kind, Path], topo: Topology) -> None:
    checks.policy_steps(models["moe"], topo, {"recipe": "fp8_blockwise", "emulate": True}, "R3")
    quantised = PrecisionConfig(recipe="fp8_tensorwise", emulate=True, first_layers_bf16=1)
    checks.outer_layers_are_plain(models["moe"], topo, quantised, "local")


@pytest.mark.parametrize("te_like", [False, True], ids=["AdamW", "an Adam like Transformer Engine's"])
def test_checkpoint_goes_on_in_another_process(te_like: bool, models: dict[Kind, Path], tmp_path: Path) -> None:
    """Between AdamW, which a CPU has, and an Adam with the habits of Transformer Engine's, both ways."""
    saved = run_side(models["moe"], tmp_path, "save", "saved", gpu=False, te_like=te_like)
    loaded = run_side(models["moe"], tmp_path, "load", "loaded", gpu=False, te_like=not te_like)
    assert {saved["adam"], loaded["adam"]} == {"AdamW", "TeLikeAdam"}
    assert_carried_over(saved, loaded, next_step=1e-5)


@pytest.mark.slow
def test_quick_run(models: dict[Kind, Path], tmp_path: Path) -> None:
    assert_healthy(quick_run(models["moe"], tmp_path, device="cpu"))


def test_the_random_state_of_a_gpu_does_not_reach_a_cpus_tracker(topo: Topology) -> None:
    """A GPU's generator has 16 bytes of state, a CPU's 5056: the tracker would fail at its next use."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker, few_bytes = get_cuda_rng_tracker(), torch.zeros(16, dtype=torch.uint8)
    before = {name: state.clone() for name, state in tracker.get_states().items()}
    assert before
    own = checkpoint._random_state()
    checkpoint._set_random_state(own | {"cuda": few_bytes, "megatron": dict.fromkeys(before, few_bytes)})
    assert all(torch.equal(tracker.get_states()[name], state) for name, state in before.items())
    other = {name: state.roll(1) for name, state in before.items()}
    checkpoint._set_random_state(own | {"megatron": other})
    assert all(torch.equal(tracker.get_states()[name], state) for name, state in other.items())
    checkpoint._set_random_state(own | {"megatron": before})
