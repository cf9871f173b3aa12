"""The learner's number formats: what `precision` asks for, whether this machine can do it, and switching it off.

model.py builds with a `Precision`; policy.py and diagnose.py switch quantisation off to compare with model.dtype. Real
FP8 is megatron-core's and Transformer Engine's; without them it can be emulated (fp8/). Nothing falls back by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megasapo.config import ConfigError
from megasapo.mcore.compat import transformer_engine_usable
from megasapo.mcore.emulation import emulations
from megasapo.sections import PrecisionConfig

# by recipe: what megatron-core calls it, and the rows that its blocks, or cuBLAS, want a multiple of
NAMES = {"fp8_delayed": "delayed", "fp8_tensorwise": "tensorwise", "fp8_blockwise": "blockwise", "mxfp8": "mxfp8"}
ROWS = {"fp8_delayed": 16, "fp8_tensorwise": 16, "fp8_blockwise": 128, "mxfp8": 32}


@dataclass(frozen=True, slots=True)
class Precision:
    """`PrecisionConfig` for one model on one kind of device."""

    cfg: PrecisionConfig
    layers: int  # decoder layers of the model
    use_te: bool  # whether the model is built of Transformer Engine's modules

    @staticmethod
    def of(cfg: PrecisionConfig, layers: int) -> Precision:
        """Raises ConfigError for a recipe that neither this machine nor emulation can run."""
        if cfg.first_layers_bf16 + cfg.last_layers_bf16 >= layers and cfg.quantises:
            raise ConfigError(
                f"precision.first_layers_bf16={cfg.first_layers_bf16} + last_layers_bf16={cfg.last_layers_bf16} leave "
                f"none of the model's {layers} layers to quantise: lower them, or use precision.recipe=bf16"
            )
        if cfg.quantises and not cfg.emulate:
            refuse_unusable(cfg)
        return Precision(cfg, layers, use_te=transformer_engine_usable() and not cfg.emulate)

    @property
    def emulates(self) -> bool:
        return self.cfg.quantises and self.cfg.emulate

    @property
    def rows(self) -> int:
        """Rows that a rank's matrices come in multiples of."""
        return ROWS[self.cfg.recipe] if self.cfg.quantises and not self.cfg.emulate else 1

    def quantises_layer(self, index: int) -> bool:
        """Whether decoder layer `index` (from 0, over all stages) is quantised."""
        return self.cfg.quantises and self.cfg.first_layers_bf16 <= index < self.layers - self.cfg.last_layers_bf16

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


def refuse_unusable(cfg: PrecisionConfig) -> None:
    """ConfigError when this device or its Transformer Engine cannot run a recipe: which megatron-core would ignore."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"precision.recipe={cfg.recipe} needs an NVIDIA GPU of compute capability 8.9 or newer and Transformer "
            "Engine, and there is no GPU here: use precision.emulate=true to study it, or precision.recipe=bf16"
        )
    if not transformer_engine_usable():
        raise ConfigError(
            f"precision.recipe={cfg.recipe} needs Transformer Engine: pip install 'megasapo[gpu]', or use "
            "precision.emulate=true or precision.recipe=bf16"
        )


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
