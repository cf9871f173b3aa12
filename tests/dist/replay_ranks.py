"""What each rank of test_replay.py runs: whole models under their own routing, a foreign one, mixtures of the two.

Started as `python -m tests.dist.replay_ranks WORLD_SIZE PORTS DIR`; rank 0 saves what the ranks computed of each
layout. What must be equal bit for bit on one layout is compared here, the rest by pytest.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.dist import model_reference as given

LAYERS, DENSE, EXPERTS, TOP_K = 4, 1, 8, 3
SPARSE = [i for i in range(LAYERS) if i != DENSE]
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    1: {"single": {}},
    2: {"tp2": {"tp": 2}, "cp2": {"cp": 2}, "pp2vpp2": {"pp": 2, "vpp": 2}},
    4: {"pp2ep2": {"pp": 2, "ep": 2}, "tp2pp2vpp2": {"tp": 2, "pp": 2, "vpp": 2}, "tp2cp2": {"tp": 2, "cp": 2}},
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "recompute": ("float32", FULL),
    "bfloat16": ("bfloat16", {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
}
CUT = 2  # of the MoE layers: so many are held at a routing while those above choose by themselves
GROUPS, GROUPS_USED = 4, 2
# As DeepSeek-V3 routes: sigmoid scores, experts of the best groups only, a bias that moves choices but no gate
DEEPSEEK = FULL | {
    "moe_layer_freq": [0] + [1] * (LAYERS - 1),
    "moe_router_score_function": "sigmoid",
    "moe_router_num_groups": GROUPS,
    "moe_router_group_topk": GROUPS_USED,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 48,
}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {"none": ("none", {}), "R2": ("R2", {}), "R2 recompute": ("R2", FULL)}
Arrays = dict[str, torch.Tensor]


def foreign_routing() -> list[np.ndarray]:
    """Of each sequence [n - 1, LAYERS, TOP_K]: random experts, as a rollout server would send them."""
    random = np.random.default_rng(11)
    return [random.random((n - 1, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K] for n in given.LENGTHS]


def main() -> None:
    from megasapo.sections import ParallelConfig
    from megasapo.mcore.topology import Topology

    world_size, ports, directory = int(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3])
    for port, (layout, sizes) in zip(ports, LAYOUTS[world_size].items(), strict=True):
        os.environ["MASTER_PORT"] = port
        topo = Topology.init(ParallelConfig(**sizes))
        result: dict[str, Any] = {name: _run_model(directory / "model", name, topo) for name in VARIANTS}
        result["deepseek"] = _run_deepseek(directory / "model", topo)
        result["policy"] = {
            name: _run_policy(directory / "model", topo, sizes, replay, over)
            for name, (replay, over) in POLICIES.items()
            if replay == "R2" or world_size == 1
        }
        if topo.rank == 0:
            torch.save(result, directory / f"ranks{world_size}" / f"{layout}.pt")
        topo.barrier()
        topo.destroy()


class Model:
    """A model under test with its replay, and passes over four micro-batches, one of them empty."""

    def __init__(self, chunks: list[Any], topo: Any) -> None:
        from megasapo.mcore.replay import RoutingReplay

        self.chunks, self.topo = chunks, topo
        self.ddp = _whole_gradients(chunks)
        self.replay = RoutingReplay(self.ddp)
        self.micro = _micro_batches(topo)
        self.foreign = [mb.with_(routing=_foreign(mb, self.replay)) for mb in self.micro]

    def logprobs(self, micro: list[Any], routed: Any) -> list[np.ndarray]:
        """[n - 1] of each sequence."""
        from megasapo.mcore import step

        values = step.logprobs(self.ddp, micro, self.topo, temperature=given.TEMPERATURE, routed=routed)
        return _whole(micro, values, self.topo)

    def gradients(self, micro: list[Any], routed: Any = None) -> Arrays:
        """Of every parameter of this rank; `routed` None: replayed."""
        from megasapo.mcore import step

        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        with nullcontext(routed) if routed else self.replay.step() as inside:
            step.forward_backward(
                self.ddp, micro, self.topo, _weighted, temperature=given.TEMPERATURE, with_entropy=False, routed=inside
            )
        # chunks of an interleaved pipeline number their layers alike
        named = [(f"{i} {n}", p) for i, chunk in enumerate(self.chunks) for n, p in chunk.named_parameters()]
        return {name: parameter.main_grad.clone() for name, parameter in named}

    def check_its_own(self, variant: str) -> dict[str, Any]:
        """Logprobs and recorded routing; what was recorded must change no bit of logprobs and gradients."""
        from megasapo.mcore import step

        native = self.logprobs(self.micro, step.natively)
        _assert_same(self.logprobs(self.micro, self.replay.record), native, f"{variant}: recording")
        own = [mb.with_(routing=routing) for mb, routing in zip(self.micro, self.replay.take(), strict=True)]
        _assert_same(self.logprobs(own, self.replay.replay), native, f"{variant}: its own routing")
        wanted, found = self.gradients(self.micro, step.natively), self.gradients(own)
        differs = [name for name, value in wanted.items() if not torch.equal(value, found[name])]
        assert not differs, f"{variant}: replaying its own routing changes the gradients of {differs}"
        return {"native": native, "own": own, "recorded": _routings(own, self.topo, self.replay.layers)}


def _assert_same(got: list[np.ndarray], wanted: list[np.ndarray], what: str) -> None:
    assert all(np.array_equal(*pair) for pair in zip(got, wanted, strict=True)), what


def _run_model(model_dir: Path, variant: str, topo: Any) -> dict[str, Any]:
    """Its own routing, a foreign one, and in float32 a foreign one in some layers only."""
    from megasapo.sections import ModelConfig
    from megasapo.mcore import bridge
    from megasapo.mcore.model import build_model, read_hf_config

    dtype, over = VARIANTS[variant]
    hf_config = read_hf_config(model_dir)
    cfg = ModelConfig(path=str(model_dir), dtype=dtype, override_transformer_config=over)
    chunks = build_model(cfg, hf_config, topo)
    bridge.load_hf(chunks, model_dir)
    model = Model(chunks, topo)
    result = model.check_its_own(variant)
    del result["own"]
    result["forced"] = model.logprobs(model.foreign, model.replay.replay)
    if variant == "float32":
        result["held"] = _held(model, result)
    model.gradients(model.foreign)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    exported = bridge.export_hf(chunks, hf_config, topo, bucket_bytes=1 << 20)
    return result | {"gradients": {name: value.clone() for bucket in exported for name, value in bucket}}


def _held(model: Model, result: dict[str, Any]) -> list[np.ndarray]:
    """Logprobs with the first CUT MoE layers forced; with none and with all of them not a bit may change."""

    def below(cut: int) -> list[np.ndarray]:
        free = torch.tensor([SPARSE.index(layer) >= cut for layer in model.replay.layers])
        mixed = [torch.where(free[:, None], -1, mb.routing.short()) for mb in model.foreign]
        micro = [mb.with_(routing=routing) for mb, routing in zip(model.micro, mixed, strict=True)]
        return model.logprobs(micro, model.replay.replay)

    _assert_same(below(0), result["native"], "no layer is held")
    _assert_same(below(len(SPARSE)), result["forced"], "all layers are held")
    return below(CUT)


def _run_deepseek(model_dir: Path, topo: Any) -> dict[str, Any]:
    """A model of no family, with random weights: its own routing, a foreign one, and its own after the bias moved."""
    from megasapo.sections import ModelConfig
    from megasapo.mcore import step
    from megasapo.mcore.model import build_model, read_hf_config

    cfg = ModelConfig(path=str(model_dir), dtype="float32", override_transformer_config=DEEPSEEK)
    chunks = build_model(cfg, read_hf_config(model_dir), topo)
    model = Model(chunks, topo)
    routers = [m for chunk in chunks for m in chunk.modules() if getattr(m, "expert_bias", None) is not None]
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters() if p.dim() >= 2):
            parameter.mul_(5)  # logits well apart
        for router in routers:
            random = torch.Generator().manual_seed(router.layer_number)
            router.expert_bias.copy_(0.2 * torch.randn(EXPERTS, generator=random))
    result = model.check_its_own("deepseek")
    own, native = result.pop("own"), result["native"]
    for router in routers:
        router.expert_bias.zero_()
    result["unbiased"] = model.logprobs(model.micro, step.natively)
    _assert_same(model.logprobs(own, model.replay.replay), native, "its own routing after the bias moved")
    result["forced"] = model.logprobs(model.foreign, model.replay.replay)
    of_own, of_foreign = model.gradients(own), model.gradients(model.foreign)
    changes = {
        f"rank {topo.rank}: {name}": (float(value.abs().max()), float((value - of_own[name]).abs().max()))
        for name, value in of_foreign.items()
        if name.endswith(("router.weight", "shared_experts.linear_fc1.weight"))
    }
    first_shards = topo.gather(changes if topo.shard.tp_rank == topo.shard.cp_rank == topo.dp_rank == 0 else {})
    return result | {"changes": {name: figures for part in first_shards for name, figures in part.items()}}


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
    from megasapo.routing.cut import cut_routing

    numbers = {"layers": replay.layers, "num_experts": replay.num_experts, "top_k": replay.top_k}
    whole = [foreign_routing()[uid] for uid in mb.uids]
    return torch.from_numpy(cut_routing(whole, mb.slots, mb.sequence.numpy(), mb.position.numpy(), **numbers))


def _whole(micro: list[Any], values: list[Any], topo: Any) -> list[np.ndarray]:
    """[n - 1, ...] of each sequence, put together from all ranks that have values."""
    from megasapo.data.packing import join, pieces

    parts = topo.gather([pieces(mb, value) for mb, value in zip(micro, values, strict=True) if value is not None])
    whole = join(piece for part in parts for piece in part)
    return [whole[uid] for uid in range(len(given.LENGTHS))]


def _routings(micro: list[Any], topo: Any, layers: tuple[int, ...]) -> list[np.ndarray]:
    """[n - 1, LAYERS, TOP_K] of each sequence, from all ranks' tokens and layers."""
    whole = [np.zeros((n - 1, LAYERS, TOP_K), np.uint8) for n in given.LENGTHS]
    for layer in sorted({layer for part in topo.gather(layers) for layer in part}):
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
    main()
