"""What a model can be asked: read from its config.json, checked before a request leaves.

Used by the fleet. It matters because a real SGLang on the CPU dies of a token id beyond the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasapo.rollout.protocol import RolloutError
from megasapo.routing.validate import RoutingRule
from megasapo.types import SamplingParams


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Sizes from an HF config.json; 0 experts for a dense model."""

    vocab_size: int
    max_positions: int
    num_layers: int
    num_experts: int
    topk: int
    model_type: str
    dense_layers: tuple[int, ...]  # of a mixture-of-experts model

    @staticmethod
    def read(model_path: str | Path) -> ModelLimits:
        """From model_path/config.json. Raises RolloutError naming what is missing."""
        path = Path(model_path) / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise RolloutError(f"{path}: cannot read the model's configuration: {e}") from e
        missing = [k for k in ("vocab_size", "max_position_embeddings", "num_hidden_layers") if k not in config]
        if missing:
            raise RolloutError(f"{path}: no {', '.join(missing)}")
        experts = next((config[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in config), 0)
        return ModelLimits(
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            num_layers=config["num_hidden_layers"],
            num_experts=experts,
            topk=config.get("num_experts_per_tok", 0),
            model_type=config.get("model_type", ""),
            dense_layers=_dense_layers(config),
        )

    def routing_rule(self) -> RoutingRule:
        """What servers of this model send when they are asked for routing; RolloutError for a dense model."""
        if not self.num_experts or not self.topk:
            raise RolloutError("return_routed_experts was asked of a model whose config.json has no experts")
        moe_layers = tuple(i for i in range(self.num_layers) if i not in self.dense_layers)
        return RoutingRule(self.num_layers, moe_layers, self.num_experts, self.topk)

    def check_engine(self, engine: str) -> None:
        """Refuse a model that an engine would run wrongly without saying so."""
        if engine == "sglang" and self.model_type == "qwen3_moe" and self.dense_layers:
            raise RolloutError(
                f"the model has dense layers {list(self.dense_layers)}; SGLang (0.5.21) takes every qwen3_moe layer "
                "for a mixture of experts and would sample from uninitialised weights: use rollout.engine=embedded"
            )

    def check(self, input_ids: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> None:
        """Raise ValueError for a prompt that no server of this model can answer."""
        if len(input_ids) != len(sampling):
            raise ValueError(f"{len(input_ids)} prompts but {len(sampling)} sampling parameters")
        for i, (ids, s) in enumerate(zip(input_ids, sampling, strict=True)):
            if not ids:
                raise ValueError(f"prompt {i} is empty")
            if min(ids) < 0 or max(ids) >= self.vocab_size:
                raise ValueError(f"prompt {i}: token ids {min(ids)}..{max(ids)}, the vocabulary has {self.vocab_size}")
            if len(ids) + s.max_new_tokens > self.max_positions:
                raise ValueError(
                    f"prompt {i}: {len(ids)} tokens + max_new_tokens={s.max_new_tokens} exceed the model's "
                    f"max_position_embeddings={self.max_positions}"
                )


def _dense_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """Layers without experts, as Qwen's and DeepSeek's configurations say it."""
    only, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    first = config.get("first_k_dense_replace") or 0
    layers = range(config["num_hidden_layers"])
    return tuple(i for i in layers if i in only or (i + 1) % step or i < first)
