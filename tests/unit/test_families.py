"""Families beside Qwen3: sizes against transformers, what is refused, and what released files have beside the model.

Logprobs, round trips and generation: test_model.py and test_bridge.py in tests/dist, test_server_generate.py here.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megasapo.config import ConfigError
from megasapo.families import FAMILIES, family
from megasapo.families.weights import BridgeError
from megasapo.geometry import geometry
from megasapo.layout import check_layout
from megasapo.mcore.bridge.load import load_hf
from megasapo.mcore.bridge.placement import place
from megasapo.plan.memory import held_parameters
from megasapo.plan.work import Degrees
from megasapo.sections import ParallelConfig
from tests.tiny import KINDS, SHAPE
from tests.unit.bridge_fakes import VOCAB, fake_model, fill_from

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 256}


def hf_config(kind: str, **over: Any) -> Any:
    name, shape = KINDS[kind]
    return getattr(transformers, f"{name}Config")(**{**SHAPE, **shape, **over})


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("qwen2_moe", {}),
        ("qwen2_moe", {"qkv_bias": False, "decoder_sparse_step": 2, "mlp_only_layers": [], "num_attention_heads": 8}),
        ("mixtral", {}),
        ("mixtral", {"head_dim": None, "tie_word_embeddings": True}),
        ("glm4_moe", {}),
        (
            "glm4_moe",
            {"attention_bias": False, "use_qk_norm": False, "first_k_dense_replace": 3, "n_shared_experts": 1},
        ),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 0, "tie_word_embeddings": True}),
        ("gpt_oss", {}),
        ("gpt_oss", {"num_attention_heads": 8, "tie_word_embeddings": True, "layer_types": ["full_attention"] * 4}),
    ],
)
def test_parameters_and_flops_are_those_of_transformers(kind: str, over: dict[str, Any]) -> None:
    config = hf_config(kind, **over)
    sizes = geometry(json.loads(config.to_json_string(use_diff=False)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count, named = sizes.parameters(), dict(model.named_parameters())
    assert count.total == sum(p.numel() for p in named.values())
    assert count.experts == sum(p.numel() for name, p in named.items() if ".experts." in name)
    assert held_parameters(sizes, Degrees(1, 1, 1, 1, 1, 1, 1), 0).total == count.total
    # two FLOPs for each weight of a matrix that a token passes: of experts, top-k of all
    experts = sum(p.numel() for name, p in named.items() if ".experts." in name and not name.endswith("bias"))
    others = sum(p.numel() for name, p in named.items() if p.dim() > 1 and ".experts." not in name)
    tied = 0 if sizes.tied else sizes.vocab * sizes.hidden  # the embedding is looked up
    assert sizes.linear_flops() == 2 * (others - tied + experts * sizes.top_k // sizes.experts)


def test_a_tensor_parallel_rank_holds_its_part_of_biases_and_shared_expert() -> None:
    sizes = geometry(json.loads(hf_config("qwen2_moe").to_json_string(use_diff=False)))
    whole, half = (held_parameters(sizes, Degrees(tp, tp, 1, 1, 1, 1, 1), 0).dense for tp in (1, 2))
    replicated = 4 * 2 * 64 + 64 + 3 * 64 * (8 + 1)  # norms, and the gates of router and shared expert in three layers
    assert 2 * half - whole == replicated


def test_layers_with_a_window_attend_to_fewer_pairs() -> None:
    sizes = geometry(json.loads(hf_config("gpt_oss").to_json_string(use_diff=False)))
    pairs = sum(min(t, 8) for t in range(1, 21)) * 2 + 20 * 21 // 2 * 2 + (1 + 2 + 3) * 4  # two layers have a window
    assert sizes.attention_flops([20, 3]) == pairs * 4 * 4 * 16  # products, 2 FLOPs, heads, head_dim
    flops = [sizes.forward_flops([n]) for n in (10_000, 40_000)]
    cost = [n + sizes.cost_ratio * n * n for n in (10_000, 40_000)]
    assert cost[1] / cost[0] == pytest.approx(flops[1] / flops[0], rel=1e-4)


def test_experts_with_biases_are_not_cut() -> None:
    sizes = geometry(json.loads(hf_config("gpt_oss").to_json_string(use_diff=False)))
    with pytest.raises(ConfigError, match=r"parallel\.etp=2: .*'gpt_oss' have them; use etp=1"):
        check_layout(ParallelConfig(etp=2), 2, sizes)


def test_mxfp4_checkpoints_are_refused_with_what_to_do() -> None:
    fields = json.loads(hf_config("gpt_oss").to_json_string(use_diff=False))
    fields["quantization_config"] = {"quant_method": "mxfp4"}
    with pytest.raises(ConfigError, match=r"MXFP4.*Mxfp4Config\(dequantize=True\)"):
        geometry(fields)


@pytest.mark.parametrize(
    ("kind", "over", "message"),
    [
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096 is not supported for mixtral; only None is"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with normalised scores is not supported"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob=False with num_experts_per_tok=4 is not supported"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias=False is not supported for gpt_oss; only True is"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported"),
        ("glm4_moe", {"topk_group": 1}, "num_experts_per_tok=4 with topk_group=1 is not supported"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False is not supported"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("deepseek_v3", {"rope_parameters": YARN | {"rope_type": "linear"}}, "only rope_type 'default', and 'yarn'"),
        ("deepseek_v3", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "without attention_factor"),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale_all_dim": 1.0}}, "with mscale where it has mscale_all_dim"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(kind: str, over: dict[str, Any], message: str) -> None:
    config = hf_config(kind, **over)
    with pytest.raises(ConfigError, match=message):
        family(config.model_type).transformer_fields(config, geometry(config.to_dict()))


def test_scaled_positions_are_refused() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ConfigError, match="rope_type='linear' is not supported"):
        family("mixtral").rotary(hf_config("mixtral", rope_parameters=rope))


def test_a_tensor_parallel_rank_holds_projections_to_latents_whole() -> None:
    sizes = geometry(json.loads(hf_config("deepseek_v3").to_json_string(use_diff=False)))
    whole, half = (held_parameters(sizes, Degrees(tp, tp, 1, 1, 1, 1, 1), 0).dense for tp in (1, 2))
    layer = 2 * 64 + 24 + 16 + 64 * (24 + 16 + 8)  # norms, those of latents, and the projections to latents
    assert 2 * half - whole == 4 * layer + 64 + 3 * 64 * 8  # the last norm, and routers


def test_pairs_of_latent_attention_by_hand() -> None:
    sizes = geometry(json.loads(hf_config("deepseek_v3").to_json_string(use_diff=False)))
    assert sizes.pair_flops == 4 * 2 * 4 * (20 + 10)  # layers, a multiplication and an addition, heads, q and k; v


def test_keys_and_values_of_fewer_heads_are_not_latent_attentions() -> None:
    fields = json.loads(hf_config("deepseek_v3").to_json_string(use_diff=False)) | {"num_key_value_heads": 2}
    with pytest.raises(ConfigError, match="num_key_value_heads=2 is not num_attention_heads=4"):
        geometry(fields)


def test_a_quantised_directory_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BridgeError, match=rf"hf-to-hf --src {tmp_path} --dst COPY --dtype bfloat16"):
        load_hf([], tmp_path)


@pytest.mark.parametrize(("name", "value"), [("first_k_dense_replace", 5), ("num_experts_per_tok", 9)])
def test_sizes_that_cannot_be_are_refused_by_name(name: str, value: int) -> None:
    fields = json.loads(hf_config("glm4_moe").to_json_string(use_diff=False)) | {name: value}
    with pytest.raises(ConfigError, match=f"{name}={value} is"):
        geometry(fields)


def test_every_family_is_known_by_its_own_name() -> None:
    assert {hf_config(kind).model_type for kind in KINDS} == set(FAMILIES)


def test_layers_for_multi_token_prediction_are_left_out_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"model_type": "glm4_moe", "vocab_size": VOCAB, "num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    tensors: dict[str, torch.Tensor] = {}
    fill_from(place([fake_model("local")], config), tensors)
    extra = {f"model.layers.4.{name}.weight": torch.ones(2) for name in ("eh_proj", "enorm", "self_attn.q_proj")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors | extra, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load_hf([fake_model("local")], tmp_path)
    assert "3 tensors of multi-token prediction (model.layers.4.eh_proj.weight, ...) are not trained" in caplog.text

    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "a.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(extra, "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BridgeError, match=r"b\.safetensors: no such file .*model\.layers\.4\.eh_proj"):
        load_hf([fake_model("local")], tmp_path)  # not first when the run's end exports them

    save_file(tensors | {"model.layers.5.eh_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(BridgeError, match=r"model\.layers\.5\.eh_proj\.weight' belongs to no parameter"):
        load_hf([fake_model("local")], tmp_path)
