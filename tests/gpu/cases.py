"""What the GPU tests run, on any device: tests/unit/test_gpu_cases.py runs it on a CPU, in the local spec.

Tiny models whose widths suit FP8, a model under test with its passes and gradients, and a policy with a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

from megasapo import config
from megasapo.algo.settings import resolve
from megasapo.algo.weights import token_weights
from megasapo.data.packing import join, pack, pieces
from megasapo.mcore import bridge, exchange, precision, step
from megasapo.mcore.model import build_model, read_hf_config
from megasapo.mcore.optim import wrap_ddp
from megasapo.mcore.policy import Policy
from megasapo.mcore.replay import RoutingReplay
from megasapo.mcore.topology import Topology
from megasapo.routing.cut import cut_routing
from megasapo.sections import ModelConfig, PrecisionConfig
from megasapo.types import Batch, MicroBatch, TrainSequence
from tests.dist import model_reference as given
from tests.tiny import make_model

Spec = Literal["te", "local"]
Kind = Literal["moe", "dense"]
Values = dict[int, np.ndarray]  # of each sequence, by uid

LAYERS, EXPERTS, TOP_K = 3, 8, 2
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MOE = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 128}


def make_models(directory: Path) -> dict[Kind, Path]:
    """One of each kind, saved in bfloat16, so that every dtype begins with the same weights."""
    return {
        "moe": make_model(directory / "moe", "moe", dtype=torch.bfloat16, **SHAPE, **MOE),
        "dense": make_model(directory / "dense", "dense", dtype=torch.bfloat16, **SHAPE),
    }


def rows() -> list[TrainSequence]:
    """The sequences of model_reference, all tokens but the first in the loss, with advantages of both signs."""
    advantages = np.random.default_rng(3).normal(size=len(given.LENGTHS))
    found = []
    for uid, ids in enumerate(given.sequences()):
        logp = np.full(len(ids), -6.0, dtype=np.float32)
        logp[0] = 0.0
        found.append(TrainSequence(uid, ids, np.arange(len(ids)) > 0, logp, float(advantages[uid])))
    return found


def foreign_routing() -> list[np.ndarray]:
    """Of each sequence [n - 1, LAYERS, TOP_K]: random experts, as a rollout server would send them."""
    random = np.random.default_rng(11)
    return [random.random((n - 1, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K] for n in given.LENGTHS]


@contextmanager
def layer_spec(spec: Spec) -> Iterator[None]:
    """Models built inside are of this spec: "te" as it comes, "local" as if Transformer Engine were not there."""
    with patch.object(precision, "transformer_engine_usable", lambda: False) if spec == "local" else nullcontext():
        yield


class Model:
    """A model under test: logprobs, routing and gradients of two packed micro-batches, the second of padding alone."""

    def __init__(
        self,
        model_dir: Path,
        topo: Topology,
        *,
        spec: Spec,
        dtype: str = "bfloat16",
        quantised: PrecisionConfig | None = None,
    ) -> None:
        self.topo = topo
        self._hf = read_hf_config(model_dir)
        with layer_spec(spec):
            cfg = ModelConfig(path=str(model_dir), dtype=dtype)
            self.chunks = build_model(cfg, self._hf, topo, precision=quantised)
        bridge.load_hf(self.chunks, model_dir)
        self.precision = self.chunks[0].outside.precision
        assert self.precision.use_te == (spec == "te"), f"asked for the {spec} spec, got {self.precision}"
        self.ddp: list[Any] = wrap_ddp(self.chunks)
        self.replay = RoutingReplay(self.ddp) if getattr(self._hf, "num_experts", 0) else None
        packed = partial(pack, shard=replace(topo.shard, rows=self.precision.cfg.rows))
        self.micro = [packed(rows(), given.token_weights()).to(topo.device), packed([], []).to(topo.device)]

    def logprobs(self, micro: list[MicroBatch] | None = None, routed: step.Routed = step.natively) -> Values:
        """[n - 1] of each sequence."""
        micro = self.micro if micro is None else micro
        values = step.logprobs(self.ddp, micro, self.topo, temperature=given.TEMPERATURE, routed=routed)
        return join(pieces(mb, v) for mb, v in zip(micro, values, strict=True) if v is not None)

    def own_routing(self) -> list[MicroBatch]:
        """The micro-batches with the routing that its routers choose."""
        assert self.replay is not None
        self.logprobs(routed=self.replay.record)
        return [mb.with_(routing=z) for mb, z in zip(self.micro, self.replay.take(), strict=True)]

    def with_routing(self, whole: list[np.ndarray]) -> list[MicroBatch]:
        """The micro-batches with given routings of whole sequences."""
        assert self.replay is not None
        numbers = {"layers": self.replay.layers, "num_experts": EXPERTS, "top_k": TOP_K}
        found = []
        for mb in self.micro:
            of_tokens = mb.sequence.cpu().numpy(), mb.position.cpu().numpy()
            routing = cut_routing([whole[uid] for uid in mb.uids], mb.slots, *of_tokens, **numbers)
            found.append(mb.with_(routing=torch.from_numpy(routing).to(self.topo.device)))
        return found

    def forced(self, micro: list[MicroBatch]) -> Values:
        """Logprobs under the micro-batches' routing, if the model has experts."""
        return self.logprobs(micro, self.replay.replay) if self.replay is not None else self.logprobs()

    def gradients(self, micro: list[MicroBatch] | None = None) -> dict[str, torch.Tensor]:
        """Of model_reference's loss, in the weights' precision, by HF name; replayed where there is a routing."""
        micro = self.micro if micro is None else micro
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        replays = self.replay is not None and micro[0].routing is not None
        with self.replay.step() if replays and self.replay is not None else nullcontext(step.natively) as routed:
            step.forward_backward(
                self.ddp, micro, self.topo, _loss, temperature=given.TEMPERATURE, with_entropy=True, routed=routed
            )
        # export from the weights' places: parameters of another dtype would lose the hooks that fill main_grad
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        weights = [p.detach().clone() for p in parameters]
        try:
            _fill(parameters, [p.main_grad for p in parameters])
            buckets = bridge.export_hf(self.chunks, self._hf, self.topo, bucket_bytes=1 << 24)
            return {name: value.float().cpu().clone() for bucket in buckets for name, value in bucket}
        finally:
            _fill(parameters, weights)


@torch.no_grad()
def _fill(parameters: list[Any], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _loss(scores: Any, mb: MicroBatch) -> tuple[torch.Tensor, dict[str, Any]]:
    assert scores.entropy is not None
    return (mb.weight * (scores.logp + given.ENTROPY_WEIGHT * scores.entropy)).sum(), {}


def apart(found: Values, wanted: Values) -> float:
    """Mean absolute difference over all tokens."""
    assert found.keys() == wanted.keys()
    return float(np.concatenate([np.abs(found[uid] - wanted[uid]) for uid in wanted]).mean())


def same(found: Values, wanted: Values) -> bool:
    """Bit for bit."""
    return found.keys() == wanted.keys() and all(np.array_equal(found[uid], wanted[uid]) for uid in wanted)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, by the norm of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12))


def settings(model_dir: Path, **sections: Any) -> config.Config:
    """A configuration for the tiny models; `sections` are settings by section, over the defaults here."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(model_dir), "dtype": "bfloat16"},
        "data": {"max_prompt_tokens": 32},
        "rollout": {"max_new_tokens": 64},
        "optim": {"lr": 1e-4},
        "train": {"micro_batch_tokens": 128},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return config.from_dict(base)


def padded(topo: Topology, cfg: config.Config) -> Topology:
    """The tests share one topology; a run makes its own, whose micro-batches are padded to the recipe's rows."""
    rows = cfg.precision.rows
    return replace(topo, rows=rows) if rows > 1 else topo


def make_policy(cfg: config.Config, topo: Topology) -> Policy:
    return Policy(cfg, topo, resolve(cfg.algo, cfg.rollout), temperature=given.TEMPERATURE, total_steps=100)


def make_batch(cfg: config.Config, policy: Policy, topo: Topology, routing: list[np.ndarray] | None = None) -> Batch:
    """The rows as one rollout batch, packed as train.py packs them."""
    found = rows()
    if routing is not None:
        found = [
            TrainSequence(r.uid, r.tokens, r.loss_mask, r.rollout_logp, r.advantage, z.astype(np.uint8))
            for r, z in zip(found, routing, strict=True)
        ]
    return exchange.build_batch(
        found,
        topo,
        mini_batches=cfg.algo.mini_batches,
        group_size=2,
        packing=exchange.PackingRule.of(cfg),
        weight_rule=partial(token_weights, normalisation="sequence", constant_length=1),
        routing=policy.routing_layout if routing is not None else None,
    )
