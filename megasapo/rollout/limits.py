"""What a model can be asked, and what engines can do with it: read from its config.json, checked before it matters.

Used by the fleet. A real SGLang on the CPU dies of a token id beyond the vocabulary, and any takes weights quantised
otherwise than its own without a word. It must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megasapo.data.prompts import PromptDataset
from megasapo.errors import ConfigError
from megasapo.geometry import read_config, read_geometry
from megasapo.rollout.protocol import RolloutError
from megasapo.routing.validate import RoutingRule
from megasapo.types import SamplingParams

BLOCK = 128  # sides of SGLang's FP8 blocks, and its groups of activations


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
        """From model_path/config.json. Raises RolloutError naming what is missing, ConfigError where nothing is."""
        config = read_config(model_path)
        missing = [k for k in ("vocab_size", "max_position_embeddings", "num_hidden_layers") if k not in config]
        if missing:
            raise RolloutError(f"{model_path}/config.json: no {', '.join(missing)}")
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
        if engine == "sglang" and self.model_type in ("qwen2_moe", "qwen3_moe") and self.dense_layers:
            raise RolloutError(
                f"the model has dense layers {list(self.dense_layers)}; SGLang (0.5.21) takes every layer of a "
                f"{self.model_type} for a mixture of experts and would sample from uninitialised weights: use "
                "rollout.engine=embedded"
            )

    def check(self, input_ids: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> None:
        """Raise ValueError for a prompt that no server of this model can answer."""
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


def check_prompts(model_path: str, dataset: PromptDataset, max_new_tokens: int) -> None:
    """Refuse a file with a prompt that leaves the model no room for a whole response (ConfigError)."""
    most = ModelLimits.read(model_path).max_positions
    longest = max(dataset.prompts, key=lambda prompt: len(prompt.input_ids))
    if len(longest.input_ids) + max_new_tokens > most:
        raise ConfigError(
            f"{dataset.path}:{longest.index}: the prompt's {len(longest.input_ids)} tokens + rollout.max_new_tokens="
            f"{max_new_tokens} exceed the model's max_position_embeddings={most}: lower rollout.max_new_tokens, or "
            "leave long prompts out with data.max_prompt_tokens and data.overlong=drop"
        )


def _dense_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """Layers without experts, as Qwen's and DeepSeek's configurations say it."""
    only, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    first = config.get("first_k_dense_replace") or 0
    layers = range(config["num_hidden_layers"])
    return tuple(i for i in layers if i in only or (i + 1) % step or i < first)


def check_blocks(model_path: str | Path, flags: Sequence[str]) -> None:
    """Refuse what SGLang (0.5.21), started with `flags`, would not load or run of a block-quantised model.

    It puts q, k, v and gate, up into one matrix each, whose parts must be whole blocks on every tensor-parallel rank,
    rounds activations by groups of 128, and takes no float32. RolloutError names the size.
    """
    g = read_geometry(model_path)
    tp = size_of(flags, "--tp", "--tp-size", "--tensor-parallel-size")
    ep = size_of(flags, "--ep", "--ep-size", "--expert-parallel-size")
    sizes = {"hidden_size": g.hidden, "num_attention_heads * head_dim / tp": g.query_width / tp}
    if g.latent:
        sizes["num_attention_heads * (qk_nope_head_dim + v_head_dim) / tp"] = (
            g.heads * (g.latent.plain + g.latent.value) / tp
        )
        sizes["num_attention_heads * v_head_dim / tp"] = g.output_width / tp
    else:
        sizes["num_key_value_heads * head_dim / tp"] = max(1, g.kv_heads / tp) * g.head_dim
    if not all(g.moe_layers):
        sizes["intermediate_size / tp"] = g.ffn / tp
    if any(g.moe_layers):
        sizes["moe_intermediate_size / (tp / ep)"] = g.moe_ffn * ep / tp
    for name, size in sizes.items():
        if size % BLOCK:
            raise RolloutError(
                f"rollout.quantization=fp8_block with engine=sglang needs multiples of {BLOCK}, and {model_path} has "
                f"{name} = {size:g} (tp={tp}, ep={ep}): use quantization=none, a smaller --tp, or engine=embedded"
            )
    if flag(flags, "--dtype") in ("float32", "float"):
        raise RolloutError(
            "rollout.quantization=fp8_block: SGLang computes a quantised model in bfloat16 or float16, not in "
            "`--dtype float32`: drop the flag, or use engine=embedded"
        )


def check_quantization(url: str, info: Mapping[str, Any], wanted: str) -> None:
    """Refuse a running server whose model is not quantised as `wanted` (rollout.quantization) says.

    `info`: its /server_info and /model_info. SGLang (0.5.21) names a quantization only where a flag asked for it, so
    the config.json of its model counts, too, where this machine can read it.
    """
    config = _served_config(info)
    own = (config or {}).get("quantization_config") or {}
    asked = info.get("quantization")  # by a flag
    if wanted == "none":
        method = own.get("quant_method") or asked
        fits = method is None
    elif config is None:
        method, fits = asked, asked == "fp8"
    else:
        method = own.get("quant_method")
        fits = method == "fp8" and own.get("weight_block_size") == [BLOCK, BLOCK]
    if not fits:
        where = (
            "it says itself (its config.json is not readable here)" if config is None else "say config.json and flags"
        )
        raise RolloutError(
            f"{url} serves {info.get('model_path')}, quantised as {method or 'nothing'}, {where}, but "
            f"rollout.quantization={wanted}: change that, or serve "
            + (
                "an unquantised model"
                if wanted == "none"
                else "a copy made by `tools/convert_checkpoint.py hf-to-hf --quantize fp8_block`, and where "
                "its directory is not readable here, start SGLang with --quantization fp8"
            )
        )


def refuse_quantising_flags(flags: Sequence[str]) -> None:
    """RolloutError for a server that is to quantise by itself what it gets: it would take the updates wrongly."""
    asked = flag(flags, "--quantization")
    if asked is not None:
        raise RolloutError(
            f"`--quantization {asked}` among the servers' flags: SGLang would copy bf16 updates into quantised weights "
            "without a word; drop the flag, or use rollout.quantization=fp8_block"
        )


def _served_config(info: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config.json of a server's model; None where this machine has none."""
    directory = Path(str(info.get("model_path")))
    return read_config(directory) if (directory / "config.json").is_file() else None


def size_of(flags: Sequence[str], *spellings: str) -> int:
    """The value of a flag that is a positive number; 1 without it."""
    value = flag(flags, *spellings) or "1"
    if not value.isdigit() or int(value) < 1:
        raise RolloutError(f"`{spellings[0]} {value}` among the servers' flags: give a positive whole number")
    return int(value)


def flag(flags: Sequence[str], *spellings: str) -> str | None:
    """The value of a server's flag, given as two words or with `=`; the last one counts."""
    words = [word for flag in flags for word in flag.split("=", 1)]
    return next((value for name, value in reversed(list(pairwise(words))) if name in spellings), None)
