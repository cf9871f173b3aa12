"""From an HF config to megatron-core's, and what is refused on the way; the model itself is tested in tests/dist."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from megasapo.config import ConfigError, from_dict
from megasapo.mcore.model import RMSNorm, read_hf_config, transformer_config
from megasapo.mcore.precision import Precision
from megasapo.sections import ModelConfig, PrecisionConfig


def moe(**over: Any) -> Qwen3MoeConfig:
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
    }
    return Qwen3MoeConfig(**shape | over)


def layout(**degrees: int) -> Any:
    sizes = dict.fromkeys(("tp", "pp", "ep", "cp", "etp", "vpp"), 1) | degrees
    return SimpleNamespace(**sizes, device=torch.device("cpu"))


def built(hf: Any, topo: Any = None, **cfg: Any) -> Any:
    precision = Precision(PrecisionConfig(), layers=4, use_te=False)
    return transformer_config(ModelConfig(path="/nowhere", **cfg), hf, topo or layout(), precision)


def test_moe_fields() -> None:
    hf = moe(moe_intermediate_size=48, intermediate_size=96, head_dim=24, num_experts_per_tok=3, rms_norm_eps=1e-5)
    config = built(hf, layout(tp=2, pp=2, ep=4))
    assert (config.hidden_size, config.ffn_hidden_size, config.moe_ffn_hidden_size) == (64, 96, 48)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 2, 24)
    assert (config.num_moe_experts, config.moe_router_topk, config.layernorm_epsilon) == (8, 3, 1e-5)
    assert (config.hidden_dropout, config.attention_dropout, config.moe_aux_loss_coeff) == (0, 0, 0)
    assert config.moe_router_load_balancing_type == "none"
    assert config.calculate_per_token_loss
    assert config.sequence_parallel
    assert config.params_dtype == config.pipeline_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("over", "pattern"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"decoder_sparse_step": 2}, [0, 1, 0, 1, 0, 1]),
        ({"mlp_only_layers": [0, 5]}, [0, 1, 1, 1, 1, 0]),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, [0, 0, 0, 0, 0, 1]),
    ],
)
def test_which_layers_have_experts(over: dict[str, Any], pattern: list[int]) -> None:
    assert built(moe(**over)).moe_layer_freq == pattern


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_gate_probabilities_are_normalised_over_the_chosen_experts_or_all(norm_topk_prob: bool) -> None:
    assert built(moe(norm_topk_prob=norm_topk_prob)).moe_router_pre_softmax is not norm_topk_prob


def test_overrides_reach_megatron() -> None:
    config = built(moe(), override_transformer_config={"recompute_granularity": "selective", "num_layers": 6})
    assert config.recompute_granularity == "selective"


def test_lists_reach_megatron_as_lists_and_what_it_refuses_is_said() -> None:
    def given(override: str) -> Any:
        cfg = from_dict({"model": {"path": "m"}}, [f"model.override_transformer_config={override}"])
        return built(moe(), override_transformer_config=cfg.model.override_transformer_config)

    assert given("{moe_layer_freq: [1, 0, 1, 0], num_layers: 4}").moe_layer_freq == [1, 0, 1, 0]
    with pytest.raises(ConfigError, match=r"\{'recompute_granularity': 'sometimes'\}: .*sometimes"):
        given("{recompute_granularity: sometimes}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"recompute_granularty": "full"}, "no field 'recompute_granularty'; did you mean 'recompute_granularity'"),
        ({"tensor_model_parallel_size": 2}, "follows from `parallel.tp`"),
        ({"calculate_per_token_loss": False}, "follows from `algo.normalisation`"),
        ({"moe_z_loss_coeff": 1e-3}, "moe_z_loss_coeff=0.001 adds a loss that .* nothing is divided later"),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(moe(), override_transformer_config=override)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
    ],
)
def test_variants_nobody_tested_are_refused(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(moe(**over))


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="model_type='llama' is not supported; supported: qwen3_moe, qwen3"):
        built(LlamaConfig())


def test_missing_and_broken_model_directories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    with pytest.raises(ConfigError, match="no_such_family"):
        read_hf_config(tmp_path)


def test_rms_norm_is_the_formula_and_marks_its_weight() -> None:
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True), 4, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    # mean square 1.5, plus 0.5: divided by sqrt(2)
    out = norm(torch.tensor([1.0, -1.0, 2.0, 0.0]))
    torch.testing.assert_close(out * 2**0.5, torch.tensor([1.0, -2.0, 6.0, 0.0]))
    assert norm.weight.sequence_parallel is True
