"""The planner's memory against what a Policy on real ranks holds: weights, gradients, optimizer state, activations.

pytest starts this file again as two ranks (`python -m tests.dist.test_plan_memory MODELS OUT PORTS`), which run all
layouts one after the other and write down what they found.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasapo import config
from megasapo.geometry import read_geometry
from megasapo.plan.memory import PLAIN, held_parameters, kept_bytes, parameter_bytes
from megasapo.plan.work import Degrees, Work
from megasapo.types import TrainSequence
from tests.dist.launcher import free_ports, run_ranks
from tests.tiny import make_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tp": 2},
    "ep2-bf16": {"ep": 2, "dtype": "bfloat16"},
    "cp2-selective": {"cp": 2, "recompute": "selective"},
    "pp2": {"pp": 2},
    "tp2-etp2-full": {"tp": 2, "etp": 2, "recompute": "full"},
    "pp2-vpp2-bf16-full": {"pp": 2, "vpp": 2, "dtype": "bfloat16", "recompute": "full"},
    "latent-tp2": {"tp": 2},
    "latent-cp2": {"cp": 2},
    "latent-pp2-selective": {"pp": 2, "recompute": "selective"},
}
PADDING = 0.005  # of megatron-core's buffers, whose parameters begin at multiples of 64 elements
TOLERANCE = 0.15  # of activations: biases of indices, masks and statistics are left out or rounded
TOKENS = 512  # of a micro-batch
MICRO = 4


def settings(model: str, layout: dict[str, Any]) -> config.Config:
    degrees = {name: size for name, size in layout.items() if name not in ("dtype", "recompute")}
    return config.from_dict(
        {
            "model": {"path": model, "dtype": layout.get("dtype", "float32")},
            "parallel": degrees,
            "data": {"max_prompt_tokens": 1},
            "rollout": {"max_new_tokens": TOKENS - 1, "prompts_per_step": 8, "group_size": 2},
            "train": {"micro_batch_tokens": TOKENS, "recompute": layout.get("recompute", "none")},
        }
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, one of them dense, and a vocabulary that tp pads; grouped-query attention and latent attention."""
    directory = tmp_path_factory.mktemp("plan")
    make_model(directory / "moe", kind="moe", mlp_only_layers=[1], vocab_size=515)
    make_model(directory / "latent", kind="deepseek_v3", vocab_size=515)
    return directory


def model_of(models: Path, layout: str) -> Path:
    return models / ("latent" if layout.startswith("latent") else "moe")


@cache
def measured(models: Path) -> Path | AssertionError:
    out = models / "found"
    ports = ",".join(map(str, free_ports(len(LAYOUTS))))  # a process group for each layout
    try:
        run_ranks(2, "tests.dist.test_plan_memory", str(models), str(out), ports, logs=out)
    except AssertionError as e:
        return e
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_is_what_the_planner_says(name: str, models: Path) -> None:
    where, model = measured(models), model_of(models, name)
    if isinstance(where, AssertionError):
        raise where
    ranks = json.loads((where / f"{name}.json").read_text())
    cfg, sizes = settings(str(model), LAYOUTS[name]), read_geometry(model)
    degrees = Degrees.of(cfg.parallel, len(ranks))
    work = Work.of(cfg, degrees, TOKENS // 4)
    work = replace(work, micro_batches=MICRO, micro_tokens=TOKENS)
    all_state = 0
    for rank in ranks:
        held = held_parameters(sizes, degrees, rank["stage"])
        weights, gradients, optimizer = parameter_bytes(held, degrees, cfg.model.dtype)
        assert rank["weights"] == weights
        assert gradients <= rank["gradients"] <= gradients * (1 + PADDING)
        assert rank["optimizer"] == pytest.approx(optimizer, rel=PADDING)
        all_state += optimizer
        kept = kept_bytes(
            sizes,
            degrees,
            work,
            rank["stage"],
            dtype=cfg.model.dtype,
            recompute=cfg.train.recompute,
            kernels=PLAIN,
        )
        print(f"{name}, stage {rank['stage']}: activations {rank['activations']}, planned {kept:.0f}")
        assert rank["activations"] == pytest.approx(kept, rel=TOLERANCE)
        assert rank["left"] == 0, "backward must free everything"
    # padding moves the borders between shards, and the sum is exact up to the rounding of each rank's share
    assert abs(sum(rank["optimizer"] for rank in ranks) - all_state) <= 2 * 12 * len(ranks)


class Saved:
    """Bytes that autograd holds for backward, each storage once, parameters left out; the most at any time."""

    def __init__(self, parameters: Any) -> None:
        self._own = {p.untyped_storage().data_ptr() for p in parameters}
        self._held: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.now = self.most = 0

    @contextmanager
    def watching(self) -> Any:
        import torch

        with torch.autograd.graph.saved_tensors_hooks(partial(_Kept, self), lambda kept: kept.tensor):
            yield

    def add(self, tensor: Any) -> int | None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._own or not storage.nbytes():
            return None
        self._held[key] += 1
        if self._held[key] == 1:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        return key

    def drop(self, key: int) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            self.now -= self._sizes.pop(key)


class _Kept:
    """What stands in the graph for a saved tensor; it goes when the graph lets go of it."""

    def __init__(self, saved: Saved, tensor: Any) -> None:
        self.tensor = tensor.detach()  # an output of its own node would keep itself alive
        self._saved, self._key = saved, saved.add(tensor)

    def __del__(self) -> None:
        if self._key is not None:
            self._saved.drop(self._key)


def _rank_main() -> None:
    from megasapo.mcore.topology import Topology

    models, out, ports = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
    for port, (name, layout) in zip(ports, LAYOUTS.items(), strict=True):
        os.environ["MASTER_PORT"] = port
        cfg = settings(str(model_of(models, name)), layout)
        topo = Topology.init(cfg.parallel)
        found = topo.gather(_measure(cfg, topo))
        if topo.rank == 0:
            (out / f"{name}.json").write_text(json.dumps(found))
        topo.barrier()
        topo.destroy()


def _measure(cfg: config.Config, topo: Any) -> dict[str, Any]:
    from megasapo.algo.settings import resolve
    from megasapo.mcore.policy import Policy

    policy = Policy(cfg, topo, resolve(cfg.algo, cfg.rollout), temperature=1.0, total_steps=5)
    ddp = policy._ddp
    batch = policy.with_old_logprobs(_batch(cfg, topo), first=True)
    saved = Saved([p for chunk in ddp for p in chunk.parameters()])
    with saved.watching():
        policy.update(batch)
    inner = policy._optimizer._inner
    adams = [part.optimizer for part in getattr(inner, "chained_optimizers", [inner])]
    states = [value for adam in adams for state in adam.state.values() for value in state.values() if value.dim()]
    if cfg.model.dtype == "bfloat16":  # Adam steps on fp32 copies; in fp32 on the weights themselves
        states += [p for adam in adams for group in adam.param_groups for p in group["params"]]
    buffers = [b for chunk in ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "stage": topo.pp_rank,
        "weights": sum(p.numel() * p.element_size() for chunk in ddp for p in chunk.parameters()),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": sum(t.numel() * t.element_size() for t in states),
        "activations": saved.most,
        "left": saved.now,
    }


def _batch(cfg: config.Config, topo: Any) -> Any:
    """MICRO micro-batches a replica, each of exactly TOKENS slots in sequences of a quarter."""
    from megasapo.algo.weights import token_weights
    from megasapo.mcore import exchange

    rng = np.random.default_rng(0)
    tokens = TOKENS // 4 + 1
    rows = []
    if topo.is_leader:
        for uid in range(topo.dp_rank, 4 * MICRO * topo.dp, topo.dp):
            ids = rng.integers(0, 500, tokens).astype(np.int32)
            rows.append(TrainSequence(uid, ids, np.arange(tokens) > 1, np.zeros(tokens, np.float32), 1.0))
    return exchange.build_batch(
        rows,
        topo,
        mini_batches=1,
        group_size=1,
        packing=exchange.PackingRule.of(cfg),
        weight_rule=partial(token_weights, normalisation="sequence", constant_length=1),
    )


if __name__ == "__main__":
    _rank_main()
