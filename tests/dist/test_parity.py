"""One step, however it is cut: the parity matrix of docs/numerics.md, in fp32 against one rank.

pytest starts this file again as N ranks, once for each world size (`python -m tests.dist.test_parity rank ...`); rank 0
saves what each layout computed and pytest compares. `python -m tests.dist.test_parity write` runs everything and puts
the table into docs/numerics.md.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.dist import parity_layouts as given
from tests.dist.launcher import ROOT, free_ports, run_ranks
from tests.dist.parity_compare import TOLERANCE, Difference, compare, failures, relative, table
from tests.dist.parity_layouts import CASES, LAYOUTS, R3, Case, Layout

TIMEOUT_S = {1: 900, 2: 900, 4: 1200, 8: 1800}  # a busy machine is several times slower
PAGE = ROOT / "docs" / "numerics.md"

SAPO, _, GSPO, _ = CASES
# Mistakes that a learner could make, each in a layout that would show it, with a line that must be reported
FAULTS = {
    "weights_per_rank": (Layout(2, ep=2, batch="few", micro_batch_tokens=64), SAPO, "loss: the loss is off"),
    "lost_gradient": (Layout(2), SAPO, "gradients: model.layers.2.self_attn.q_proj.weight"),
    "wrong_positions": (Layout(2, pp=2), SAPO, "logprobs: now logprobs of sequence 0"),
    "unequal_copies": (Layout(2, tp=2), SAPO, "copies of one tensor differ: model.layers.3.input_layernorm.weight"),
    "sequence_mean_of_own_tokens": (Layout(2, cp=2), GSPO, "loss: the loss is off"),
}
WORLDS = (1, 2, 4, 8)


def _cells(world: int) -> list[tuple[Layout, Case]]:
    layouts = [layout for layout in LAYOUTS if layout.world == world]
    if world == 1:
        layouts = [*dict.fromkeys(map(given.reference_of, LAYOUTS)), *layouts]
    return [(layout, case) for layout in layouts for case in given.cases_of(layout)]


def _file(layout: Layout, case: Case, fault: str = "") -> str:
    return f"{layout.name} {case.name} {fault}".strip().replace(" ", "_") + ".pt"


@cache
def computed(world: int, models: Path) -> AssertionError | None:
    """Run everything of one world size; why it stopped early, if it did: kept, so that a hang is waited for once."""
    ports = ",".join(map(str, free_ports(len(_plan(world)))))
    try:
        run_ranks(
            world,
            "tests.dist.test_parity",
            "rank",
            str(models),
            ports,
            logs=models / f"ranks{world}",
            timeout_s=TIMEOUT_S[world],
        )
    except AssertionError as e:
        return e
    return None


def result(models: Path, layout: Layout, case: Case, fault: str = "") -> dict[str, Any]:
    error = computed(layout.world, models)
    path = models / "results" / _file(layout, case, fault)
    if not path.exists():
        raise error or AssertionError(f"no rank wrote {path}")
    return torch.load(path)


def differences(models: Path, layout: Layout, case: Case, fault: str = "") -> tuple[dict[str, Difference], list[str]]:
    got = result(models, layout, case, fault)
    reference = result(models, given.reference_of(layout), case)
    before = load_file(models / layout.model / "now" / "model.safetensors")
    found = compare(got, reference, before)
    return found, failures(found, got["copies"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parity")
    _prepare(directory)
    return directory


def _prepare(directory: Path) -> None:
    given.make_models(directory)
    (directory / "results").mkdir()


ROWS: dict[str, dict[str, Difference]] = {}


@pytest.fixture(scope="module", autouse=True)
def _table_is_shown(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + table(ROWS))


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        pytest.param(layout, case, id=f"{layout.name}-{case.name}", marks=pytest.mark.slow if world == 8 else ())
        for world in WORLDS
        for layout, case in _cells(world)
        if layout != given.reference_of(layout)
    ],
)
def test_the_step_is_that_of_one_rank(layout: Layout, case: Case, models: Path) -> None:
    found, wrong = differences(models, layout, case)
    _add_row(ROWS, layout, found)
    assert not wrong, f"{layout} {case}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_found(fault: str, models: Path) -> None:
    layout, case, first = FAULTS[fault]
    _, wrong = differences(models, layout, case, fault)
    assert any(line.startswith(first) for line in wrong), wrong


@pytest.mark.parametrize("model", given.MODELS)
def test_the_cases_are_different_steps(model: str, models: Path) -> None:
    """Otherwise routing replay and the objectives would be compared in name only."""
    one = given.reference_of(Layout(1, model=model))
    gradients = [result(models, one, case)["gradients"] for case in (*CASES, R3)]
    for name in ("model.embed_tokens.weight", "model.layers.2.mlp.gate.weight"):
        for first, second in itertools.combinations(gradients, 2):
            assert relative(first[name], second[name], float(second[name].abs().max())) > 1000 * TOLERANCE


IN_R3_LAYOUTS = pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=layout.name, marks=pytest.mark.slow if layout.world == 8 else ())
        for layout in given.WITH_R3
    ],
)


@IN_R3_LAYOUTS
def test_a_rank_receives_the_routing_of_its_tokens_and_layers_only(layout: Layout, models: Path) -> None:
    received = result(models, layout, R3)["routing_ids"]
    assert all(got == needed for got, needed in received), received
    assert sum(got for got, _ in received) == result(models, given.reference_of(layout), R3)["routing_ids"][0][0]


@IN_R3_LAYOUTS
def test_a_diagnosis_says_the_same_in_every_layout(layout: Layout, models: Path) -> None:
    got, one = (result(models, x, R3)["scored"] for x in (layout, given.reference_of(layout)))
    # four passes, and for each cut between two groups of layers one at the old and one at the new weights
    assert got["passes"] == one["passes"] == 4 + 2 * (given.SWEEP_GROUPS - 1)
    assert got["sequences"].keys() == one["sequences"].keys()
    for uid, wanted in one["sequences"].items():
        for name, value in wanted.items():
            found = got["sequences"][uid][name]
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                worst = relative(found, value, float(value.abs().max()))
                assert worst < TOLERANCE, f"{name} of sequence {uid} is off by {worst:.1e}"
            else:
                np.testing.assert_array_equal(found, value, err_msg=f"{name} of sequence {uid}")


@IN_R3_LAYOUTS
def test_a_quantising_learner_is_scored_once_more_without_quantisation(layout: Layout, models: Path) -> None:
    """To leave it out is, here, to have the weights that the step was taken with, whose logprobs the step computed."""
    out = result(models, layout, R3)
    plain, found = out["scored"], out["scored_quantising"]
    assert found["passes"] == plain["passes"] + 1 == 5 + 2 * (given.SWEEP_GROUPS - 1)
    for uid, tensors in found["sequences"].items():
        mask = tensors["loss_mask"]
        unquantised, expected = tensors.pop("unquantised_replayed"), out["logp"]["now"][uid]
        torch.testing.assert_close(unquantised[mask], expected[mask].float(), rtol=0, atol=1e-5)
        assert (unquantised - tensors["behaviour_replayed"])[mask].abs().max() > 1e-3
        assert plain["sequences"][uid].pop("unquantised_replayed") is None
        for name, value in plain["sequences"][uid].items():
            np.testing.assert_array_equal(tensors[name], value, err_msg=f"{name} of sequence {uid}")


@pytest.mark.parametrize("model", given.MODELS)
def test_the_parts_of_a_diagnosis_are_scored_as_they_should_be(model: str, models: Path) -> None:
    """Held to the old logprobs that the step itself computed, and to what each pass must not change."""
    out = result(models, given.reference_of(Layout(1, model=model)), R3)
    for uid, tensors in out["scored"]["sequences"].items():
        s = {name: np.asarray(value) for name, value in tensors.items()}
        mask = s["loss_mask"]
        # R3's old logprobs are those of the old weights under the rollout's routing
        np.testing.assert_allclose(s["behaviour_replayed"][mask], out["logp"]["old"][uid].numpy()[mask], atol=2e-6)
        np.testing.assert_allclose(s["mismatch_sweep"][[0, -1]], [s["behaviour"], s["behaviour_replayed"]])
        np.testing.assert_allclose(s["drift_sweep"][[0, -1]], [s["current"], s["current_replayed"]])
        known = (s["routing_rollout"] >= 0).all((1, 2))
        if known.sum() > 3:  # a routing drawn by chance: everything differs
            assert np.abs(s["behaviour"] - s["behaviour_replayed"])[mask & known].max() > 1e-2
        if not known.any():  # nothing is held, so nothing differs
            np.testing.assert_array_equal(s["behaviour"], s["behaviour_replayed"])
            np.testing.assert_array_equal(s["mismatch_sweep"], np.broadcast_to(s["behaviour"], s["mismatch_sweep"].shape))


def _add_row(rows: dict[str, dict[str, Difference]], layout: Layout, found: dict[str, Difference]) -> None:
    row = rows.setdefault(layout.name, found)
    rows[layout.name] = {c: max(row[c], found[c], key=lambda d: d.error) for c in found}


# --- what each rank runs


def _plan(world: int) -> dict[Layout, list[tuple[Case, str]]]:
    """Layouts in order with their cases and faults: one process group each."""
    plan: dict[Layout, list[tuple[Case, str]]] = {}
    for layout, case in _cells(world):
        plan.setdefault(layout, []).append((case, ""))
    for fault, (layout, case, _) in FAULTS.items():
        if layout.world == world:
            plan.setdefault(layout, []).append((case, fault))
    return plan


def _rank_main(models: Path, ports: list[str]) -> None:
    from megasapo.mcore.topology import Topology
    from tests.dist import parity_faults, parity_step

    for port, (layout, runs) in zip(ports, _plan(int(os.environ["WORLD_SIZE"])).items(), strict=True):
        os.environ["MASTER_PORT"] = port
        cfg = given.configuration(layout, CASES[0], models / layout.model)
        topo = Topology.init(cfg.parallel)
        for case, fault in runs:
            broken = getattr(parity_faults, fault) if fault else None
            out = parity_step.run(layout, case, models, topo, broken)
            if topo.rank == 0:
                torch.save(out, models / "results" / _file(layout, case, fault))
        topo.barrier()
        topo.destroy()


def _write_page() -> None:
    """Run the whole matrix and replace this version's table in docs/numerics.md."""
    from importlib.metadata import version

    rows: dict[str, dict[str, Difference]] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        _prepare(Path(name))
        for world in WORLDS:
            for layout, case in _cells(world):
                if layout != given.reference_of(layout):
                    found, lines = differences(Path(name), layout, case)
                    _add_row(rows, layout, found)
                    wrong += [f"{layout.name} {case.name}: {line}" for line in lines]
    title = f"megatron-core {version('megatron-core')}, torch {version('torch')}"
    print(f"{title}\n\n{table(rows)}\n" + "\n".join(wrong))
    minor = ".".join(version("megatron-core").split(".")[:2])
    begin, end = f"<!-- table {minor} -->", f"<!-- end of table {minor} -->"
    head, _, rest = PAGE.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    assert tail, f"{PAGE} has no place for the table: put {begin} and {end} into it"
    PAGE.write_text(f"{head}{begin}\n{title}:\n\n{table(rows)}\n{end}{tail}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        _rank_main(Path(sys.argv[2]), sys.argv[3].split(","))
    else:
        _write_page()
