"""Emulated FP8 on real ranks: steps run in every layout, equal one rank's where they must, and checkpoints continue.

Run as `python -m tests.dist.test_fp8_emulation MODEL DIR RECIPE COPIES LAYOUT` it is one rank of the scenario below.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.launcher import run_ranks
from tests.emulated import Learner, sequences
from tests.tiny import make_model

COMPARED = ("loss/policy", "grad/norm", "ratio/log_var", "entropy/mean")
LAYERS = 4
ROUNDED = [1, 2]  # the first and the last are not
LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "tp2": {"tp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "ep2": {"ep": 2},
    "cp2": {"cp": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("emulated") / "model", "moe", num_hidden_layers=LAYERS)


def run_layout(layout: str, recipe: str, model: Path, where: Path, copies: int = 1) -> dict[str, Any]:
    world = 1 if layout == "one" else 2
    arguments = (str(model), str(where), recipe, str(copies), layout)
    run_ranks(world, "tests.dist.test_fp8_emulation", *arguments, logs=where / "logs")
    return json.loads((where / "result.json").read_text())


@pytest.fixture(scope="module")
def one_rank(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    recipes = ("fp8_tensorwise", "fp8_blockwise")
    return {recipe: run_layout("one", recipe, model, tmp_path_factory.mktemp("one")) for recipe in recipes}


@pytest.mark.parametrize(
    ("layout", "copies"),
    [("pp2 vpp2", 1), ("ep2", 2)],  # every replica gets a copy, so that experts see the same largest values
)
def test_a_layout_that_cuts_no_tensor_takes_one_ranks_steps(
    layout: str, copies: int, model: Path, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    result = run_layout(layout, "fp8_tensorwise", model, tmp_path, copies)
    for found, expected in zip(result["steps"], one_rank["fp8_tensorwise"]["steps"], strict=True):
        for name in COMPARED:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-9, err_msg=name)
    assert result["rounded_layers"] == ([ROUNDED, ROUNDED] if layout == "ep2" else [[2], [1]])
    assert result["resumed"] == result["continued"]


@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_delayed_scales_agree_over_ranks_and_continue_from_a_checkpoint(
    layout: str, model: Path, tmp_path: Path
) -> None:
    result = run_layout(layout, "fp8_delayed", model, tmp_path)
    assert all(step["grad/skipped_steps"] == 0 for step in result["steps"])
    assert all(np.isfinite([step[name] for name in COMPARED]).all() for step in result["steps"])
    assert result["resumed"] == result["continued"]
    scales = result["scales"]
    assert len(scales) == (1 if layout == "one" else 2)
    if layout != "pp2 vpp2":
        assert all(own == scales[0] for own in scales)
    assert all(0 < scale != 1 for own in scales for chunk in own for scale in chunk)


@pytest.mark.parametrize(("layout", "near"), [("tp2", 2e-2), ("cp2", 1e-4)])
def test_scales_of_each_row_do_not_depend_on_who_holds_it(
    layout: str, near: float, model: Path, one_rank: dict[str, Any], tmp_path: Path
) -> None:
    """Under tp rows themselves are cut, and with them blocks, whose scales of powers of two make little difference."""
    found, expected = run_layout(layout, "fp8_blockwise", model, tmp_path), one_rank["fp8_blockwise"]
    for name in ("mismatch/logprob_abs_diff", "entropy/mean"):
        np.testing.assert_allclose(found["steps"][0][name], expected["steps"][0][name], rtol=near, err_msg=name)
    assert found["steps"][0]["grad/norm"] == pytest.approx(expected["steps"][0]["grad/norm"], rel=0.05)


def scenario(model: Path, where: Path, recipe: str, copies: int, layout: str) -> None:
    from megasapo.mcore.emulation import emulations
    from megasapo.mcore.topology import Topology
    from megasapo.sections import ParallelConfig

    topo = Topology.init(ParallelConfig(**LAYOUTS[layout]))
    precision: dict[str, Any] = {"recipe": recipe, "emulate": True}
    if recipe != "fp8_delayed":  # which has one history for all layers
        precision |= {"first_layers_bf16": 1, "last_layers_bf16": 1}
    learner = Learner(model, topo, precision, pack=False, parallel=LAYOUTS[layout])
    own = emulations(learner.policy._ddp)

    def step(seed: int) -> dict[str, float]:
        return learner.step(sequences(seed, count=4, copies=copies))

    def weights() -> str:
        digest = hashlib.sha256()
        for chunk in learner.weights():
            for _, tensor in sorted(chunk.items()):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    layers = [
        layer.layer_number - 1
        for chunk in learner.policy._chunks
        for layer in chunk.decoder.layers
        if "_forward_impl" in vars(layer.self_attention.linear_qkv)
    ]
    result: dict[str, Any] = {
        "rounded_layers": topo.gather(layers),
        "steps": [step(0), step(1)],
    }
    path = learner.policy.save(where / "run", {"step": 2})
    result["scales"] = topo.gather([e.history.scale.tolist() for e in own if e.history is not None])
    result["continued"] = [step(2), step(3), topo.gather(weights())]
    learner.policy.load(path)
    result["resumed"] = [step(2), step(3), topo.gather(weights())]
    if topo.rank == 0:
        (where / "result.json").write_text(json.dumps(result))
    topo.destroy()


if __name__ == "__main__":
    scenario(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
