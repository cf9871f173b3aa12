"""Routing replay of whole models over processes, against transformers with its routers forced by hand.

pytest starts this file again as N ranks (`python -m tests.dist.test_replay LAYOUTS PORTS DIR`), once for each world
size; rank 0 saves what the ranks computed, under HF names, and pytest compares.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dist import model_reference as given
from tests.dist.launcher import free_ports, run_ranks
from tests.tiny import make_model

LAYERS, DENSE, EXPERTS, TOP_K = 4, 1, 8, 3
SPARSE = [i for i in range(LAYERS) if i != DENSE]
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"single": {}},
    2: {"tp2": {"tp": 2}, "cp2": {"cp": 2}, "pp2vpp2": {"pp": 2, "vpp": 2}},
    4: {"pp2ep2": {"pp": 2, "ep": 2}, "tp2pp2vpp2": {"tp": 2, "pp": 2, "vpp": 2}, "tp2cp2": {"tp": 2, "cp": 2}},
}
CASES = [
    pytest.param(world_size, name, marks=pytest.mark.slow if world_size > 2 else (), id=name)
    for world_size, layouts in LAYOUTS.items()
    for name in layouts
]
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "recompute": ("float32", FULL),
    "bfloat16": ("bfloat16", {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {"none": ("none", {}), "R2": ("R2", {}), "R2 recompute": ("R2", FULL)}
Arrays = dict[str, torch.Tensor]


def foreign_routing() -> list[np.ndarray]:
    """Of each sequence [n - 1, LAYERS, TOP_K]: random experts, as a rollout server would send them."""
    random = np.random.default_rng(11)
    return [random.random((n - 1, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K] for n in given.LENGTHS]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("replay")
    make_model(directory / "model", num_hidden_layers=LAYERS, mlp_only_layers=[DENSE], num_experts_per_tok=TOP_K)
    return directory


@cache
def reference(model_dir: Path) -> tuple[list[torch.Tensor], Arrays, list[torch.Tensor]]:
    """Logprobs and gradients under the foreign routing, and each sequence's natural router scores [L, n - 1, E]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir / "model", dtype=torch.float32).eval()
    natural: list[torch.Tensor] = []
    logps: list[torch.Tensor] = []
    for ids in given.sequences():
        with torch.no_grad():
            natural.append(torch.stack(model(torch.from_numpy(ids)[None, :-1].long(), output_router_logits=True)[-1]))
    for ids, weight, routing in zip(given.sequences(), given.token_weights(), foreign_routing(), strict=True):
        for i in SPARSE:
            _force(model.model.layers[i].mlp.gate, torch.from_numpy(routing[:, i]))
        tokens = torch.from_numpy(ids).long()
        log_probs = (model(tokens[None, :-1]).logits[0] / given.TEMPERATURE).log_softmax(-1)
        logp = log_probs.gather(1, tokens[1:, None])[:, 0]
        (weight * logp).sum().backward()
        logps.append(logp.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logps, _by_expert(gradients), natural


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
        run_ranks(world_size, "tests.dist.test_replay", str(world_size), ports, str(directory), logs=out, timeout_s=480)
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
    logps, gradients, _ = reference(model_dir)
    for variant in ("float32", "recompute"):
        for i, logp in enumerate(logps):
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
def test_what_is_recorded_is_what_transformers_chooses(world_size: int, layout: str, model_dir: Path) -> None:
    got = results(world_size, layout, model_dir)["float32"]["recorded"]
    compared = total = 0
    for recorded, logits in zip(got, reference(model_dir)[2], strict=True):
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


def _rank_main() -> None:
    from megasapo.config import ParallelConfig
    from megasapo.mcore.topology import Topology

    world_size, ports, directory = int(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3])
    for port, (layout, sizes) in zip(ports, LAYOUTS[world_size].items(), strict=True):
        os.environ["MASTER_PORT"] = port
        topo = Topology.init(ParallelConfig(**sizes))
        result: dict[str, Any] = {name: _run_model(directory / "model", name, topo) for name in VARIANTS}
        result["policy"] = {
            name: _run_policy(directory / "model", topo, sizes, replay, over)
            for name, (replay, over) in POLICIES.items()
            if replay == "R2" or world_size == 1
        }
        if topo.rank == 0:
            torch.save(result, directory / f"ranks{world_size}" / f"{layout}.pt")
        topo.barrier()
        topo.destroy()


def _run_model(model_dir: Path, variant: str, topo: Any) -> dict[str, Any]:
    """Replay the model's own routing, bit for bit, and a foreign one, in four micro-batches, one of them empty."""
    from megasapo.config import ModelConfig
    from megasapo.mcore import bridge, model, step
    from megasapo.mcore.replay import RoutingReplay

    dtype, over = VARIANTS[variant]
    hf_config = model.read_hf_config(model_dir)
    cfg = ModelConfig(path=str(model_dir), dtype=dtype, override_transformer_config=over)
    chunks = model.build_model(cfg, hf_config, topo)
    bridge.load_hf(chunks, model_dir, topo)
    ddp = _whole_gradients(chunks)
    replay = RoutingReplay(ddp)
    micro = _micro_batches(topo)

    def logprobs(micro: list[Any], routed: Any) -> list[np.ndarray]:
        values = step.logprobs(ddp, micro, topo, temperature=given.TEMPERATURE, routed=routed)
        return _whole(micro, values, topo)

    def gradients(micro: list[Any], routed: Any) -> list[torch.Tensor]:
        for chunk in ddp:
            chunk.zero_grad_buffer()
        step.forward_backward(
            ddp, micro, topo, _weighted, temperature=given.TEMPERATURE, with_entropy=False, routed=routed
        )
        return [p.main_grad.clone() for chunk in chunks for p in chunk.parameters()]

    result: dict[str, Any] = {"native": logprobs(micro, step.natively), "again": logprobs(micro, replay.record)}
    own = [mb.with_(routing=routing) for mb, routing in zip(micro, replay.take(), strict=True)]
    result["replayed"] = logprobs(own, replay.replay)
    for values in (result["again"], result["replayed"]):
        assert all(np.array_equal(*pair) for pair in zip(values, result["native"], strict=True)), variant
    wanted = gradients(micro, step.natively)
    with replay.step() as routed:
        found = gradients(own, routed)
    names = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    differs = [name for name, a, b in zip(names, wanted, found, strict=True) if not torch.equal(a, b)]
    assert not differs, f"{variant}: replaying its own routing changes the gradients of {differs}"
    result["recorded"] = _routings(own, topo, replay.layers)
    foreign = [mb.with_(routing=_foreign(mb, replay)) for mb in micro]
    result["forced"] = logprobs(foreign, replay.replay)
    with replay.step() as routed:
        gradients(foreign, routed)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    exported = bridge.export_hf(chunks, hf_config, topo, bucket_bytes=1 << 20)
    return result | {"gradients": {name: value.clone() for bucket in exported for name, value in bucket}}


def _whole_gradients(chunks: list[Any]) -> list[Any]:
    """The chunks with gradients summed over data-parallel ranks and, unlike in training, kept whole on each."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = lambda m, _tokens=None, **kw: finalize_model_grads(m, None, **kw)
    return [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]


def _weighted(scores: Any, mb: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    return (mb.weight * scores.logp).sum(), {}


def _micro_batches(topo: Any) -> list[Any]:
    from megasapo.data.packing import pack

    mine = _rows()[topo.dp_rank :: topo.dp]
    weights = given.token_weights()
    parts = (mine[:1], [], mine[1:2], mine[2:])
    return [pack(part, [weights[row.uid] for row in part], shard=topo.shard) for part in parts]


def _rows(advantages: Any = None) -> list[Any]:
    from megasapo.types import TrainSequence

    rows = []
    for i, ids in enumerate(given.sequences()):
        logp, advantage = np.zeros(len(ids), dtype=np.float32), 0.0 if advantages is None else float(advantages[i])
        rows.append(TrainSequence(i, ids, np.arange(len(ids)) > 0, logp, advantage))
    return rows


def _foreign(mb: Any, replay: Any) -> torch.Tensor:
    from megasapo.mcore.replay import cut_routing

    numbers = {"layers": replay.layers, "num_experts": replay.num_experts, "top_k": replay.top_k}
    whole = [foreign_routing()[uid] for uid in mb.uids]
    return cut_routing(whole, mb.slots, mb.sequence.numpy(), mb.position.numpy(), **numbers)


def _whole(micro: list[Any], values: list[Any], topo: Any) -> list[np.ndarray]:
    """[n - 1, ...] of each sequence, put together from all ranks that have values."""
    from megasapo.data.packing import join, pieces

    parts = topo.gather([pieces(mb, value) for mb, value in zip(micro, values, strict=True) if value is not None])
    whole = join(piece for part in parts for piece in part)
    return [whole[uid] for uid in range(len(given.LENGTHS))]


def _routings(micro: list[Any], topo: Any, layers: tuple[int, ...]) -> list[np.ndarray]:
    """[n - 1, LAYERS, TOP_K] of each sequence, from all ranks' tokens and layers."""
    whole = [np.zeros((n - 1, LAYERS, TOP_K), np.uint8) for n in given.LENGTHS]
    for layer in range(LAYERS):
        if layer != DENSE:
            column = [mb.routing[:, layers.index(layer)] if layer in layers else None for mb in micro]
            for uid, rows in enumerate(_whole(micro, column, topo)):
                whole[uid][:, layer] = rows
    return whole


def _mini_batch(rows: list[Any], topo: Any) -> Any:
    """Four micro-batches a rank, two rounds of an interleaved pipeline; each sequence's mean weighs the same."""
    from megasapo.data.packing import pack
    from megasapo.types import MiniBatch

    mine = rows[topo.dp_rank :: topo.dp]
    parts = (mine[:1], [], mine[1:2], mine[2:])
    micro = [pack(part, [1 / len(rows) / (len(r.tokens) - 1) for r in part], shard=topo.shard) for part in parts]
    return MiniBatch(tuple(micro), len(rows), sum(len(r.tokens) - 1 for r in rows))


def _run_policy(
    model_dir: Path, topo: Any, sizes: dict[str, int], replay: str, over: dict[str, Any]
) -> dict[str, float]:
    """The statistics of two optimizer steps on one batch with a large learning rate."""
    from megasapo import config, metrics
    from megasapo.algo.settings import resolve
    from megasapo.mcore.policy import Policy
    from megasapo.types import Batch

    cfg = config.from_dict(
        {
            "model": {"path": str(model_dir), "dtype": "float32", "override_transformer_config": over},
            "optim": {"lr": 3e-3, "schedule": "constant"},
            "algo": {"routing_replay": replay, "mini_batches": 2},
            "parallel": sizes,
            "data": {"max_prompt_tokens": 32},
            "rollout": {"max_new_tokens": 64},
            "train": {"micro_batch_tokens": 96},
        }
    )
    policy = Policy(cfg, topo, resolve(cfg.algo, cfg.rollout), temperature=given.TEMPERATURE, total_steps=10)
    rows = _rows(np.random.default_rng(3).normal(size=len(given.LENGTHS)))
    batch = Batch((_mini_batch(rows[:4], topo), _mini_batch(rows[4:], topo)))
    stats = metrics.merge(topo.gather(policy.update(policy.with_old_logprobs(batch))))
    kept = ("loss/policy", "grad/norm", "ratio/log_mean", "ratio/log_var", "ratio/ess", "entropy/mean")
    return {name: value for name, value in metrics.scalars(stats).items() if name in kept}


if __name__ == "__main__":
    _rank_main()
