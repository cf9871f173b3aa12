"""A block-FP8 model in the embedded server: weights and activations rounded as SGLang does it, products in its dtype.

Called by model.py where config.json has a quantization_config. The linear layers and experts stay transformers'; hooks
round what goes into them, by groups of 128 of each token's values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from megasapo.errors import UserError
from megasapo.families.gpt_oss import RELEASED
from megasapo.fp8.blocks import ROW_BLOCK, WEIGHT_BLOCK, dequantise_blocks, quantise_blocks
from megasapo.fp8.formats import E4M3
from megasapo.hf_files import HFFiles
from megasapo.rollout.local.weights import Weights, served_specs


def load(path: str, config: Any, dtype: Any, device: str) -> tuple[PreTrainedModel, Weights]:
    """The model of an FP8 directory, ready to run. Raises UserError for another kind of quantisation."""
    _check(path, config.quantization_config)
    del config.quantization_config  # transformers would want its own FP8 kernels, which need a GPU
    found = served_specs(HFFiles(path), config.get_text_config().num_hidden_layers)
    names = [name for name, spec in found.items() if spec.dtype is E4M3.dtype]
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
    model.to(device).eval().requires_grad_(False)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    weights = Weights(model, names)
    weights.load(path)
    round_activations(model, names)
    return model, weights


def round_activations(model: PreTrainedModel, names: Iterable[str]) -> None:
    """From now on the layers of these weights, HF names, get rounded inputs; experts also between their two products.

    Raises UserError for a name that is no linear layer's or expert's, and where only some experts are quantised.
    """
    modules = dict(model.named_modules())
    wanted = {name.removesuffix(".weight") for name in names}
    experts: dict[str, int] = {}
    for name in sorted(wanted):
        owner, _, _ = name.partition(".experts.")
        if isinstance(modules.get(name), torch.nn.Linear):
            modules[name].register_forward_pre_hook(_round_first)
        elif hasattr(modules.get(f"{owner}.experts"), "_apply_gate"):
            experts[f"{owner}.experts"] = experts.get(f"{owner}.experts", 0) + 1
        else:
            raise UserError(f"{name}: quantised, but neither a linear layer nor an expert of {type(model).__name__}")
    for name, count in experts.items():
        module: Any = modules[name]
        if count != 3 * module.num_experts:
            raise UserError(
                f"{name}: {count} of {3 * module.num_experts} matrices are quantised: it must be all or none"
            )
        module.register_forward_pre_hook(_round_first)
        module._apply_gate = _then_rounded(module._apply_gate)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> the same values as e4m3 with a scale for each 128 of a row can hold them."""
    flat = x.reshape(-1, x.shape[-1])
    values, scale_inv = quantise_blocks(flat, ROW_BLOCK)
    return dequantise_blocks(values, scale_inv, ROW_BLOCK, x.dtype).view(x.shape)


def _round_first(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return rounded(inputs[0]), *inputs[1:]


def _then_rounded(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: rounded(function(x))


def _check(path: str, quantization: Any) -> None:
    found = quantization if isinstance(quantization, dict) else quantization.to_dict()
    wanted = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(WEIGHT_BLOCK)}
    wrong = {key: found.get(key) for key in wanted if found.get(key) != wanted[key]}
    if wrong:
        by_tool = "make a copy with `tools/convert_checkpoint.py hf-to-hf --quantize fp8_block`"
        advice = RELEASED if found.get("quant_method") == "mxfp4" else by_tool
        raise UserError(
            f"--model {path}: quantization_config has {wrong}; the embedded server knows "
            f"{ {key: wanted[key] for key in wrong} } only: {advice}"
        )
