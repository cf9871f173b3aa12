"""A megatron-core GPTModel from an HF directory's config, and its forward pass over packed micro-batches.

policy.py and score.py build with `build_model` and run `forward_micro_batch` inside megatron-core's schedules; weights
come from the bridge. What a family computes, megasapo.families says. It knows nothing of losses or optimizers.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn

from megasapo.config import ConfigError
from megasapo.families import family
from megasapo.families.family import Rotary
from megasapo.geometry import geometry
from megasapo.layout import padded_vocab_size
from megasapo.mcore.attention import PackedAttention, pack
from megasapo.mcore.compat import let_biased_experts_go_backward, separate_expert_gradients
from megasapo.mcore.emulation import install
from megasapo.mcore.fusions import Fusions, apex_kernel, output_layer_without_kernel
from megasapo.mcore.head import token_logprobs
from megasapo.mcore.head_rows import choose_kernel
from megasapo.mcore.latent import use_latent_attention
from megasapo.mcore.norm import RMSNorm
from megasapo.mcore.precision import Precision, refuse_widths
from megasapo.mcore.topology import Topology
from megasapo.sections import ModelConfig, PrecisionConfig
from megasapo.types import MicroBatch

ACTIVATIONS = {"silu": F.silu, "quick_gelu": quick_gelu}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},  # by default attention's core; recompute_modules overrides
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def read_hf_config(path: str | Path) -> Any:
    """The transformers config of a local HF directory; ConfigError when there is none or it cannot be read."""
    from transformers import AutoConfig

    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path={str(path)!r}: no config.json there; give the directory of an HF model")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as e:  # it checks in many ways, and with errors of its own
        raise ConfigError(f"{path}/config.json: transformers cannot read it: {e}") from e


def build_model(
    cfg: ModelConfig,
    hf_config: Any,
    topo: Topology,
    *,
    recompute: Recompute = "none",
    precision: PrecisionConfig | None = None,
) -> list[nn.Module]:
    """This rank's model chunks (`topo.vpp` of them), with random weights, on `topo.device`.

    Each chunk is an unwrapped GPTModel with an `outside`. Raises ConfigError for a family that is not supported, or a
    precision that this machine cannot run; megasapo.layout has checked that the layout can cut the model.
    """
    numbers = Precision.of(precision or PrecisionConfig(), hf_config.num_hidden_layers, DTYPES[cfg.dtype])
    config = transformer_config(cfg, hf_config, topo, numbers, recompute=recompute)
    if numbers.use_te and numbers.cfg.quantises:
        refuse_widths(numbers.cfg, config)
    outside = Outside(
        vocab_size=hf_config.vocab_size,
        rotary=family(hf_config.model_type).rotary(hf_config),
        window=config.window_size[0] + 1 if config.window_size else None,
        head_kernel=choose_kernel(cfg.head, topo.device),
        precision=numbers,
    )
    return [_build_chunk(config, hf_config, topo, number, outside) for number in range(topo.vpp)]


def _build_chunk(config: TransformerConfig, hf_config: Any, topo: Topology, number: int, outside: Outside) -> GPTModel:
    use_te = outside.precision.use_te
    vp_stage = number if topo.vpp > 1 else None
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization=config.normalization, vp_stage=vp_stage
    )
    use_latent_attention(spec)
    if not use_te:
        _use_own_modules(spec)
    with output_layer_without_kernel(use_te=use_te):
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(hf_config.vocab_size, topo.tp),
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=topo.is_first_stage and number == 0,
            post_process=topo.is_last_stage and number == topo.vpp - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
            position_embedding_type=_rotation(config, outside),
            rotary_base=outside.rotary.theta,
            rotary_percent=outside.rotary.dim / config.kv_channels,
            vp_stage=vp_stage,
        )
    if model.post_process:
        model.output_layer.forward = _hidden_states
    model.outside = outside
    separate_expert_gradients(model, topo)
    if not use_te:
        let_biased_experts_go_backward(model)
    if outside.precision.emulates:
        install(model, outside.precision.cfg, outside.precision.quantises_layer, topo.device)
    return model.to(topo.device)


def _rotation(config: TransformerConfig, outside: Outside) -> Literal["none", "rope", "yarn"]:
    """What megatron-core is to do about positions: nothing where our own attention rotates."""
    if not outside.precision.use_te:
        return "none"
    for name, value in (outside.rotary.yarn or {}).items():
        setattr(config, f"yarn_{name}", value)  # 0.16.1 to 0.19.2 read these from the config, which has no such fields
    return "yarn" if outside.rotary.yarn else "rope"


@dataclasses.dataclass(frozen=True, slots=True)
class Outside:
    """What the forward pass needs to know of a model beside its modules."""

    vocab_size: int  # of the HF model: columns beyond it are padding
    rotary: Rotary
    window: int | None  # keys that a token sees in layers with a sliding window
    head_kernel: str
    precision: Precision


def transformer_config(
    cfg: ModelConfig, hf_config: Any, topo: Topology, precision: Precision, *, recompute: Recompute = "none"
) -> TransformerConfig:
    """megatron-core's configuration of a supported HF model, with `cfg.override_transformer_config` applied last."""
    sizes = geometry(hf_config.to_dict(), f"{cfg.path}/config.json")
    own = family(sizes.model_type).transformer_fields(hf_config, sizes)
    fields = _common_fields(cfg, topo, precision) | RECOMPUTE[recompute] | own
    fields |= precision.transformer_fields()
    fields["activation_func"] = ACTIVATIONS[fields["activation_func"]]
    kind = MLATransformerConfig if own.get("multi_latent_attention") else TransformerConfig
    fields = _overridden(kind, fields, cfg.override_transformer_config)
    try:
        config = kind(**fields)
    except (AssertionError, TypeError, ValueError) as e:
        if not cfg.override_transformer_config:
            raise
        raise ConfigError(f"model.override_transformer_config={cfg.override_transformer_config}: {e}") from e
    if config.gradient_accumulation_fusion and not precision.use_te and not apex_kernel():
        raise ConfigError(
            "model.override_transformer_config: gradient_accumulation_fusion=true needs Transformer Engine's layers "
            "or fused_weight_gradient_mlp_cuda of NVIDIA's Apex, and neither is there: leave it out"
        )
    if precision.use_te and topo.cp > 1 and config.softmax_type != "vanilla":
        raise ConfigError(
            f"parallel.cp={topo.cp}: Transformer Engine has no context parallelism for packed sequences with attention "
            f"sinks, which model_type={hf_config.model_type!r} has: use parallel.cp=1, or model.dtype=float32"
        )
    return config


def _common_fields(cfg: ModelConfig, topo: Topology, precision: Precision) -> dict[str, Any]:
    dtype = DTYPES[cfg.dtype]
    on_gpu = topo.device.type == "cuda"
    return {
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": topo.tp,
        "pipeline_model_parallel_size": topo.pp,
        "expert_model_parallel_size": topo.ep,
        "expert_tensor_parallel_size": topo.etp,
        "context_parallel_size": topo.cp,
        "virtual_pipeline_model_parallel_size": topo.vpp if topo.vpp > 1 else None,
        "sequence_parallel": topo.tp > 1,  # MoE needs it, and norms are not repeated on every rank
        "variable_seq_lengths": True,  # packed micro-batches differ in length
        "moe_token_dispatcher_type": "alltoall",  # the default refuses that, even for a dense model
        "calculate_per_token_loss": True,  # the loss carries its own weights: gradients are sums over ranks
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_func": "silu",
        "bias_activation_fusion": precision.use_te,  # torch.compile would meet other numbers of tokens in every expert
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": precision.use_te,
        "moe_grouped_gemm": precision.use_te,
        "moe_permute_fusion": precision.use_te,  # and adds up a token's experts in order: CUDA's scatter_add_ does not
        "gradient_accumulation_fusion": Fusions.find(use_te=precision.use_te, on_gpu=on_gpu).gradient_accumulation,
    }


def _overridden(kind: type[TransformerConfig], fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    for name, value in overrides.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"model.override_transformer_config: {kind.__name__} has no field {name!r}{hint}")
        quantising = QUANTISING.search(name) and name not in TUNING
        owner = OWN_FIELDS.get(name, "precision.recipe" if quantising else None)
        if owner:
            raise ConfigError(f"model.override_transformer_config: {name} follows from `{owner}`; set that")
        if name in SUMMED_LOSSES and value:
            raise ConfigError(
                f"model.override_transformer_config: {name}={value} adds a loss that megatron-core multiplies by the "
                "number of tokens, padding included, to divide it later; here nothing is divided later: leave it out"
            )
    return fields | overrides


# Fields that other settings decide; overriding them here would contradict the process groups or the parameters.
OWN_FIELDS = {
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "context_parallel_size": "parallel.cp",
    "sequence_parallel": "parallel.tp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "calculate_per_token_loss": "algo.normalisation",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "fp8": "precision.recipe",
    "fp8_recipe": "precision.recipe",
    "fp8_param": "precision.fp8_param",
    "fp8_amax_history_len": "precision.amax_history",
    "fp8_amax_compute_algo": "precision.amax_algo",
    "first_last_layers_bf16": "precision.first_layers_bf16",
    "num_layers_at_start_in_bf16": "precision.first_layers_bf16",
    "num_layers_at_end_in_bf16": "precision.last_layers_bf16",
}
# Losses of routers and of multi-token prediction, as of 0.16.1 to 0.19.2
SUMMED_LOSSES = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "mtp_num_layers")
# Other fields by these names quantise too, past what `precision` has checked; these two only tune it.
QUANTISING = re.compile("fp4|fp8|quant|kitchen")
TUNING = ("fp8_margin", "fp8_wgrad")


def _has_experts(mlp: Any) -> bool:
    """Whether the spec of a layer's MLP, a ModuleSpec in megatron-core 0.16 and a partial from 0.19 on, has experts."""
    submodules = mlp.keywords.get("submodules") if isinstance(mlp, partial) else mlp.submodules
    return isinstance(submodules, MoESubmodules)


def _use_own_modules(block: TransformerBlockSubmodules) -> None:
    """Put our norms and attention into megatron-core's local spec, which refuses sequence parallel and packing."""
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if _has_experts(layer.submodules.mlp):
            # 0.16.1 to 0.19.2 name this norm in a checkpoint as in a dense layer, but not with Transformer Engine
            names = layer.submodules.sharded_state_dict_keys_map
            layer.submodules.sharded_state_dict_keys_map = {k: v for k, v in names.items() if "pre_mlp" not in k}
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, None) not in (None, IdentityOp):
                setattr(attention, name, RMSNorm)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenScores:
    """What the last pipeline stage returns: [Tl] fp32 each, aligned with this rank's slice of the micro-batch."""

    logp: Tensor
    entropy: Tensor | None

    @property
    def device(self) -> torch.device:
        """Read by megatron-core's schedules, which take a stage's output for a tensor."""
        return self.logp.device


def forward_micro_batch(
    model: nn.Module, mb: MicroBatch, *, temperature: float, topo: Topology, with_entropy: bool = False
) -> Tensor | TokenScores:
    """One micro-batch through one chunk of this stage: hidden states, or TokenScores of the model's last chunk.

    Tokens outside `mb.wanted` get logprob and entropy 0. For use inside a schedule's forward step, training or forward
    only; the schedule hands over hidden states.
    """
    gpt = unwrapped(model)
    out = model(
        input_ids=mb.tokens[None],
        position_ids=mb.position_ids[None],
        attention_mask=None,
        packed_seq_params=_packed_seq_params(mb, gpt.outside, topo),
    )
    if not gpt.post_process:
        return out
    tied = gpt.share_embeddings_and_output_weights
    logp, entropy = token_logprobs(
        out[0],
        gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight,
        mb.targets,
        vocab_size=gpt.outside.vocab_size,
        temperature=temperature,
        tp_group=topo.tp_group,
        with_entropy=with_entropy,
        where=mb.wanted,
        kernel=gpt.outside.head_kernel,
    )
    return TokenScores(logp, entropy)


def _hidden_states(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """In place of the output layer's forward: the layer keeps the weight, and head.py multiplies by it."""
    return hidden, None


def _packed_seq_params(mb: MicroBatch, outside: Outside, topo: Topology) -> PackedSeqParams:
    if not outside.precision.use_te:
        return pack(
            mb.cu_seqlens,
            mb.max_seqlen,
            mb.position_ids,
            rotary=outside.rotary,
            window=outside.window,
            shard=topo.shard,
            cp_group=topo.cp_group if topo.cp > 1 else None,
        )
    # Padding at a sequence's end is attended like its tokens, and masked later. Context parallelism wants it said; for
    # others Transformer Engine would compare the two in every layer, and wait for the GPU each time.
    padded = mb.cu_seqlens if topo.cp > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=mb.cu_seqlens,
        cu_seqlens_kv=mb.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=mb.max_seqlen,
        max_seqlen_kv=mb.max_seqlen,
    )


def unwrapped(chunk: Any) -> Any:
    """The GPTModel of a model chunk that may be wrapped for training (DDP, Float16Module)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
