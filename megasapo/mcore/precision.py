"""The learner's number formats: what `precision` asks for, whether this machine can do it, and switching it off.

model.py builds with a `Precision`; policy.py and diagnose.py switch quantisation off to compare with model.dtype. Real
FP8 is megatron-core's and Transformer Engine's; without them it can be emulated (fp8/). Nothing falls back by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megasapo import extensions
from megasapo.config import ConfigError
from megasapo.mcore.compat import transformer_engine_usable
from megasapo.mcore.emulation import emulations
from megasapo.sections import FP8_MULTIPLES, PrecisionConfig

# by recipe: what megatron-core calls it, and Transformer Engine's function that knows whether it runs here
NAMES = {"fp8_delayed": "delayed", "fp8_tensorwise": "tensorwise", "fp8_blockwise": "blockwise", "mxfp8": "mxfp8"}
AVAILABLE = {
    "fp8_delayed": "is_fp8_available",
    "fp8_tensorwise": "is_fp8_available",
    "fp8_blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


@dataclass(frozen=True, slots=True)
class Precision:
    """`PrecisionConfig` for one model on one kind of device."""

    cfg: PrecisionConfig
    layers: int  # decoder layers of the model
    use_te: bool  # whether the model is built of Transformer Engine's modules

    @staticmethod
    def of(cfg: PrecisionConfig, layers: int, dtype: torch.dtype = torch.bfloat16) -> Precision:
        """`dtype`: model.dtype. Raises ConfigError for a recipe that neither this machine nor emulation can run.

        A model in fp32 is built of megatron-core's own layers: Transformer Engine has no fused attention in fp32, and
        its products may be in TF32.
        """
        if cfg.first_layers_bf16 + cfg.last_layers_bf16 >= layers and cfg.quantises:
            raise ConfigError(
                f"precision.first_layers_bf16={cfg.first_layers_bf16} + last_layers_bf16={cfg.last_layers_bf16} leave "
                f"none of the model's {layers} layers to quantise: lower them, or use precision.recipe=bf16"
            )
        if cfg.quantises and not cfg.emulate:
            refuse_unusable(cfg)
        use_te = transformer_engine_usable() and not cfg.emulate and dtype is torch.bfloat16
        return Precision(cfg, layers, use_te=use_te)

    @property
    def emulates(self) -> bool:
        return self.cfg.quantises and self.cfg.emulate

    def quantises_layer(self, index: int) -> bool:
        """Whether decoder layer `index` (from 0, over all stages) is quantised."""
        return self.cfg.quantises and self.cfg.first_layers_bf16 <= index < self.layers - self.cfg.last_layers_bf16

    def line(self) -> str:
        """For people: what computes in which numbers."""
        cfg = self.cfg
        layers = "Transformer Engine's layers" if self.use_te else "megatron-core's own layers"
        if not cfg.quantises:
            return f"precision: nothing quantised, {layers}"
        by = "emulated" if cfg.emulate else f"by Transformer Engine {extensions.transformer_engine().version}"
        kept = [i for i in range(self.layers) if not self.quantises_layer(i)]
        left_out = f", all but layers {', '.join(map(str, kept))}" if kept else ", all layers"
        weights = ", weights kept in FP8" * cfg.fp8_param
        return f"precision: {cfg.recipe} in {cfg.chosen_format}, {by}{left_out} of {self.layers}{weights}"

    def transformer_fields(self) -> dict[str, Any]:
        """What megatron-core's TransformerConfig is told: nothing when there is nothing real to quantise."""
        cfg = self.cfg
        if not cfg.quantises or cfg.emulate:
            return {}
        return {
            "fp8": cfg.chosen_format,
            "fp8_recipe": NAMES[cfg.recipe],
            "fp8_param": cfg.fp8_param,
            "fp8_amax_history_len": cfg.amax_history,
            "fp8_amax_compute_algo": cfg.amax_algo,
            "first_last_layers_bf16": cfg.first_layers_bf16 + cfg.last_layers_bf16 > 0,
            "num_layers_at_start_in_bf16": cfg.first_layers_bf16,
            "num_layers_at_end_in_bf16": cfg.last_layers_bf16,
        }


def why_not(recipe: str) -> str:
    """What keeps this machine from running a recipe without emulation; empty when nothing does."""
    if not torch.cuda.is_available():
        return "it needs an NVIDIA GPU of compute capability 8.9 or newer, and there is none here"
    found = extensions.transformer_engine()
    if not found.usable:
        return f"it needs Transformer Engine, which is {found.problem}: {found.advice}"
    ask = getattr(importlib.import_module("transformer_engine.pytorch"), AVAILABLE[recipe], None)
    if ask is None:
        return (
            f"Transformer Engine {found.version} is too old for it, having no {AVAILABLE[recipe]}(): install "
            f"'transformer-engine[pytorch]>=2.11,<2.12' ({extensions.FITS})"
        )
    runs, reason = ask(return_reason=True)
    if runs:
        return ""
    major, minor = torch.cuda.get_device_capability()
    here = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
    return f"Transformer Engine {found.version} on this machine ({here}): {reason}"


def refuse_unusable(cfg: PrecisionConfig) -> None:
    """ConfigError when this device or its Transformer Engine cannot run a recipe: which megatron-core would ignore."""
    reason = why_not(cfg.recipe)
    if not reason:
        return
    others = [recipe for recipe in AVAILABLE if recipe != cfg.recipe and not why_not(recipe)]
    instead = "".join(f"precision.recipe={recipe}, " for recipe in others)
    raise ConfigError(
        f"precision.recipe={cfg.recipe} cannot run here: {reason}. "
        f"Use {instead}precision.recipe=bf16, or precision.emulate=true to study it"
    )


def refuse_widths(cfg: PrecisionConfig, config: Any) -> None:
    """ConfigError for a model whose matrices, as tensor parallelism cuts them, a recipe cannot multiply on a GPU.

    `config`: the TransformerConfig. Transformer Engine would stop at the first product, with shapes but no names.
    """
    multiple = cfg.rows
    tp, etp = config.tensor_model_parallel_size, config.expert_tensor_parallel_size or 1
    heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
    widths = {
        "hidden_size": config.hidden_size,
        f"num_attention_heads * head_dim / tp({tp})": heads * config.kv_channels // tp,
    }
    if config.multi_latent_attention:
        ranks = {"q_lora_rank": config.q_lora_rank or 0, "kv_lora_rank": config.kv_lora_rank}
        widths |= ranks | {
            "kv_lora_rank + qk_rope_head_dim": config.kv_lora_rank + config.qk_pos_emb_head_dim,
            f"num_attention_heads * v_head_dim / tp({tp})": heads * config.v_head_dim // tp,
            f"num_attention_heads * (qk_nope_head_dim + v_head_dim) / tp({tp})": (
                heads * (config.qk_head_dim + config.v_head_dim) // tp
            ),
        }
    else:
        widths[f"(num_attention_heads + 2 * num_key_value_heads) * head_dim / tp({tp})"] = (
            (heads + 2 * groups) * config.kv_channels // tp
        )
    if _has_dense_layers(config):
        widths[f"intermediate_size / tp({tp})"] = config.ffn_hidden_size // tp
    if config.num_moe_experts:
        widths[f"moe_intermediate_size / etp({etp})"] = config.moe_ffn_hidden_size // etp
    if shared := config.moe_shared_expert_intermediate_size:
        widths[f"width of the shared expert / tp({tp})"] = shared // tp
    wrong = [f"{name} = {width}" for name, width in widths.items() if width % multiple]
    if wrong:
        raise ConfigError(
            f"precision.recipe={cfg.recipe} needs widths that are multiples of {multiple} on every rank, and "
            f"{', '.join(wrong)}: use a smaller parallel.tp or parallel.etp, another recipe "
            f"({', '.join(f'{recipe}: {m}' for recipe, m in FP8_MULTIPLES.items() if m < multiple) or 'bf16'}), or "
            "precision.emulate=true"
        )


def _has_dense_layers(config: Any) -> bool:
    layers = config.moe_layer_freq
    return not config.num_moe_experts or (isinstance(layers, list) and not all(layers))


@contextmanager
def unquantised(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """The same weights in model.dtype inside: nothing of these (possibly wrapped) model chunks is rounded to FP8."""
    modules: list[Any] = [m for chunk in chunks for m in chunk.modules() if hasattr(m, "config")]
    configs = {id(m.config): m.config for m in modules}
    before = {key: getattr(config, "fp8", None) for key, config in configs.items()}
    emulated = [(emulation, emulation.on) for emulation in emulations(chunks)]
    for config in configs.values():
        config.fp8 = None
    for emulation, _ in emulated:
        emulation.on = False
    try:
        yield
    finally:
        for emulation, was_on in emulated:
            emulation.on = was_on
        for key, config in configs.items():
            config.fp8 = before[key]


@contextmanager
def histories_kept(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Passes without gradient inside leave fp8_delayed as it is.

    Transformer Engine makes new scales after passes with gradients only, but notes the largest values of all: in the
    first row of a history, which the next scales would then come from.
    """
    before = {module: history[0].clone() for module, history in _amax_histories(chunks)}
    try:
        yield
    finally:
        for module, history in _amax_histories(chunks):
            history[0] = before.get(module, 0.0)  # 0: the pass was the module's first


def _amax_histories(chunks: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """[passes, tensors] of the forward of each module of Transformer Engine that has one."""
    for module in (m for chunk in chunks for m in chunk.modules()):
        history = getattr(getattr(module, "fp8_meta", {}).get("scaling_fwd"), "amax_history", None)
        if history is not None:
            yield module, history
