"""Routing replay of whole models over processes, against transformers with its routers forced by hand.

pytest starts replay_ranks.py as N ranks, once for each world size; rank 0 saves what the ranks computed, under HF
names, and pytest compares.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.dist import model_reference as given
from tests.dist.launcher import free_ports, run_ranks
from tests.dist.replay_ranks import (
    CUT,
    DENSE,
    EXPERTS,
    GROUPS,
    GROUPS_USED,
    LAYERS,
    LAYOUTS,
    SPARSE,
    TOP_K,
    VARIANTS,
    Arrays,
    foreign_routing,
)
from tests.tiny import make_model

CASES = [
    pytest.param(world_size, name, marks=pytest.mark.slow if world_size > 2 else (), id=name)
    for world_size, layouts in LAYOUTS.items()
    for name in layouts
]


class Reference(NamedTuple):
    """What transformers computes, of each sequence."""

    logp: list[torch.Tensor]  # [n - 1] under the foreign routing
    held: list[torch.Tensor]  # [n - 1] under it in the first CUT MoE layers only
    gradients: Arrays  # under the foreign routing
    natural: list[torch.Tensor]  # router scores [L, n - 1, E] of natural routing


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("replay")
    make_model(directory / "model", num_hidden_layers=LAYERS, mlp_only_layers=[DENSE], num_experts_per_tok=TOP_K)
    return directory


@cache
def reference(model_dir: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir / "model", dtype=torch.float32).eval()
    found = Reference([], [], {}, [])
    inputs = list(zip(given.sequences(), foreign_routing(), given.token_weights(), strict=True))
    with torch.no_grad():
        for ids, _, _ in inputs:
            scores = model(torch.from_numpy(ids)[None, :-1].long(), output_router_logits=True)[-1]
            found.natural.append(torch.stack(scores))
        for ids, routing, _ in inputs:
            found.held.append(_forced_logp(model, ids, routing, SPARSE[:CUT]))
    for ids, routing, weight in inputs:
        logp = _forced_logp(model, ids, routing, SPARSE)
        (weight * logp).sum().backward()
        found.logp.append(logp.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found.gradients.update(_by_expert(gradients))
    return found


def _forced_logp(model: Any, ids: np.ndarray, routing: np.ndarray, layers: list[int]) -> torch.Tensor:
    """[n - 1] with the routing [n - 1, LAYERS, TOP_K] in `layers`; others stay as they are."""
    for i in layers:
        _force(model.model.layers[i].mlp.gate, torch.from_numpy(routing[:, i]))
    tokens = torch.from_numpy(ids).long()
    log_probs = (model(tokens[None, :-1]).logits[0] / given.TEMPERATURE).log_softmax(-1)
    return log_probs.gather(1, tokens[1:, None])[:, 0]


def _force(gate: Any, ids: torch.Tensor) -> None:
    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.t()
        return logits, logits.gather(1, ids).softmax(-1), ids

    gate.forward = forward


def _by_expert(gradients: Arrays) -> Arrays:
    """transformers keeps the experts of a layer in one tensor; on disk, and here, each has its own."""
    found: Arrays = {}
    for name, value in gradients.items():
        stem, _, last = name.rpartition(".")
        for expert, own in enumerate(value if ".experts." in name else ()):
            if last == "down_proj":
                found[f"{stem}.{expert}.down_proj.weight"] = own
            else:
                for part, half in zip(("gate_proj", "up_proj"), own.chunk(2), strict=True):
                    found[f"{stem}.{expert}.{part}.weight"] = half
        if ".experts." not in name:
            found[name] = value
    return found


@cache
def computed(world_size: int, directory: Path) -> Path | AssertionError:
    """Run all layouts of a world size once; the directory of their results, or why there are none."""
    ports = ",".join(map(str, free_ports(len(LAYOUTS[world_size]))))  # a process group for each layout
    out = directory / f"ranks{world_size}"
    try:
        run_ranks(
            world_size, "tests.dist.replay_ranks", str(world_size), ports, str(directory), logs=out
        )
    except AssertionError as e:
        return e  # kept, so that a hang is waited for once and not by every case
    return out


def results(world_size: int, layout: str, directory: Path) -> dict[str, Any]:
    out = computed(world_size, directory)
    if isinstance(out, AssertionError):
        raise out
    return torch.load(out / f"{layout}.pt", weights_only=False)


@pytest.mark.parametrize(("world_size", "layout"), CASES)
def test_a_foreign_routing_gives_what_transformers_gives(world_size: int, layout: str, model_dir: Path) -> None:
    got = results(world_size, layout, model_dir)
    wanted = reference(model_dir)
    gradients = wanted.gradients
    for variant in ("float32", "recompute"):
        for i, logp in enumerate(wanted.logp):
            worst = np.abs(got[variant]["forced"][i] - logp.numpy()).max()
            assert worst < 1e-4, f"{variant}: logp of sequence {i} is off by {worst:.2e}"
        assert got[variant]["gradients"].keys() == gradients.keys()
        for name, value in gradients.items():
            worst = (got[variant]["gradients"][name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert worst < 1e-3, f"{variant}: gradient of {name} is off by {worst:.2e} of its largest entry"
    routers = [value for name, value in gradients.items() if name.endswith("mlp.gate.weight")]
    assert len(routers) == len(SPARSE)
    assert min(float(value.abs().max()) for value in routers) > 1e-2, "no gradient reaches the routers"
    for variant in VARIANTS:
        native, forced = (np.concatenate(got[variant][key]) for key in ("native", "forced"))
        assert np.abs(native - forced).mean() > 0.1, f"{variant}: another routing does not change the logprobs"


@pytest.mark.parametrize(("world_size", "layout"), CASES)
def test_layers_above_a_cut_choose_by_themselves(world_size: int, layout: str, model_dir: Path) -> None:
    got = results(world_size, layout, model_dir)["float32"]
    for i, logp in enumerate(reference(model_dir).held):
        worst = np.abs(got["held"][i] - logp.numpy()).max()
        assert worst < 1e-4, f"logp of sequence {i} is off by {worst:.2e}"
    for other in ("native", "forced"):
        assert np.abs(np.concatenate(got["held"]) - np.concatenate(got[other])).mean() > 0.05, other


@pytest.mark.parametrize(("world_size", "layout"), CASES)
def test_routing_as_in_deepseek(world_size: int, layout: str, model_dir: Path) -> None:
    """The ranks found its own routing to be replayed bit for bit; here: that there was something to find."""
    got = results(world_size, layout, model_dir)["deepseek"]
    own = np.concatenate([routing[:, 1:] for routing in got["recorded"]])
    groups = [len(set(ids)) for ids in (own // (EXPERTS // GROUPS)).reshape(-1, TOP_K)]
    assert max(groups) == GROUPS_USED
    assert len(np.unique(own)) == EXPERTS
    assert np.abs(np.concatenate(got["forced"]) - np.concatenate(got["native"])).mean() > 0.05
    assert np.abs(np.concatenate(got["unbiased"]) - np.concatenate(got["native"])).mean() > 0.01
    assert len(got["changes"]) == 2 * (LAYERS - 1)  # of each MoE layer router and shared expert
    for name, (largest, changed) in got["changes"].items():
        assert largest > 1e-4, f"no gradient reaches {name}"
        assert changed > 0.01 * largest, f"the gradient of {name} is that of natural routing"


@pytest.mark.parametrize(("world_size", "layout"), CASES)
def test_what_is_recorded_is_what_transformers_chooses(world_size: int, layout: str, model_dir: Path) -> None:
    got = results(world_size, layout, model_dir)["float32"]["recorded"]
    compared = total = 0
    for recorded, logits in zip(got, reference(model_dir).natural, strict=True):
        assert recorded.shape == (logits.shape[1], LAYERS, TOP_K)
        assert recorded.dtype == np.uint8
        for column, layer in enumerate(SPARSE):
            best = logits[column].sort(descending=True)
            clear = (-best.values.diff(dim=-1)[:, :TOP_K] > 1e-4).all(-1).numpy()  # not nearly tied
            np.testing.assert_array_equal(recorded[clear, layer], best.indices[:, :TOP_K].numpy()[clear])
            compared, total = compared + int(clear.sum()), total + len(clear)
    assert compared > 0.95 * total


@pytest.mark.parametrize(("world_size", "layout"), CASES)
def test_steps_after_the_weights_moved_are_the_same_in_every_layout(
    world_size: int, layout: str, model_dir: Path
) -> None:
    got, one = results(world_size, layout, model_dir)["policy"], results(1, "single", model_dir)["policy"]
    for name, value in one["R2"].items():
        np.testing.assert_allclose(got["R2"][name], value, rtol=2e-4, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(got["R2 recompute"][name], value, rtol=2e-4, atol=1e-7, err_msg=name)


def test_natural_routing_drifts_where_replay_holds_it(model_dir: Path) -> None:
    # the second mini-batch is updated with weights that the first one moved
    one = results(1, "single", model_dir)["policy"]
    assert abs(one["none"]["ratio/log_var"] / one["R2"]["ratio/log_var"] - 1) > 0.02
