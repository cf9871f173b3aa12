"""Parameters and FLOPs: against transformers, against the published Qwen3 models, against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megasapo.config import ConfigError
from megasapo.geometry import Geometry, geometry, read_geometry

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN3_0_6B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 131,
}
SMALL_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def built(kind: str, **over: Any) -> tuple[Geometry, torch.nn.Module]:
    """Geometry read from the very config.json that transformers writes, and the model it makes of it."""
    if kind == "moe":
        given = {**SMALL, **SMALL_MOE, **over}
        config = Qwen3MoeConfig(**{name: value for name, value in given.items() if value is not None})
        return geometry(json.loads(config.to_json_string(use_diff=False))), Qwen3MoeForCausalLM(config)
    config = Qwen3Config(**{**SMALL, **over})
    return geometry(json.loads(config.to_json_string(use_diff=False))), Qwen3ForCausalLM(config)


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("moe", {}),
        ("moe", {"mlp_only_layers": [0, 3], "tie_word_embeddings": True}),
        ("moe", {"decoder_sparse_step": 2, "num_key_value_heads": 6}),
        ("moe", {"head_dim": None}),
        ("dense", {}),
        ("dense", {"tie_word_embeddings": True, "num_attention_heads": 4}),
    ],
)
def test_parameters_are_those_of_transformers(kind: str, over: dict[str, Any]) -> None:
    sizes, model = built(kind, **over)
    count = sizes.parameters()
    assert count.total == sum(p.numel() for p in model.parameters())
    named = dict(model.named_parameters())
    assert count.embedding == named["model.embed_tokens.weight"].numel()
    assert count.head == (0 if over.get("tie_word_embeddings") else named["lm_head.weight"].numel())
    assert count.experts == sum(p.numel() for name, p in named.items() if ".mlp.experts." in name)


def test_published_models() -> None:
    moe = geometry(QWEN3_30B_A3B).parameters()
    assert moe.total == 30_532_122_624  # "30.5B in total and 3.3B activated"
    assert round(moe.active / 1e9, 2) == 3.35
    assert moe.total - moe.experts - moe.embedding - moe.head == moe.dense
    assert geometry(QWEN3_0_6B).parameters().total == 596_049_920
    assert geometry(QWEN3_0_6B).parameters().active == 596_049_920


def test_a_token_passes_its_experts_only() -> None:
    sizes = geometry({"model_type": "qwen3_moe", **SMALL, **SMALL_MOE})
    count = sizes.parameters()
    assert count.experts == 5 * 4 * 3 * 48 * 24
    assert count.total - count.active == 5 * 2 * 3 * 48 * 24  # two of four experts are left out


@pytest.mark.parametrize("lengths", [[7], [7, 33, 1]])
def test_flops_of_a_dense_model_are_those_that_torch_counts(lengths: list[int]) -> None:
    """Torch counts attention over all pairs, ours the causal half: that part is compared pair by pair."""
    sizes, model = built("dense")
    model.set_attn_implementation("eager")
    counted = 0
    for n in lengths:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, n, dtype=torch.int64))
        counted += counter.get_total_flops() - n * n * sizes.pair_flops
    assert counted == sum(lengths) * sizes.linear_flops()
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    assert sizes.forward_flops(lengths) == counted + pairs * 5 * 2 * 2 * 6 * 16  # layers, products, 2, heads, head_dim
    assert sizes.training_flops(lengths) == 3 * sizes.forward_flops(lengths)


def test_linear_flops_are_two_for_each_active_weight_of_a_matrix() -> None:
    sizes = geometry(QWEN3_30B_A3B)
    vectors = sizes.layers * sizes.layer_vectors + sizes.hidden
    count = sizes.parameters()
    assert sizes.linear_flops() == 2 * (count.active - vectors - count.embedding)
    assert sizes.linear_flops() - sizes.linear_flops(with_head=False) == 2 * count.head


def test_the_cost_of_a_sequence_is_proportional_to_its_flops() -> None:
    sizes = geometry(QWEN3_30B_A3B)
    cost = [n + sizes.cost_ratio * n * n for n in (1, 1000, 32768)]
    flops = [sizes.forward_flops([n]) for n in (1, 1000, 32768)]
    assert cost[1] / cost[0] == pytest.approx(flops[1] / flops[0], rel=1e-12)
    assert cost[2] / cost[0] == pytest.approx(flops[2] / flops[0], rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, r"model_type='llama' is not supported; supported: qwen3_moe, qwen3"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_experts": 0}, "num_experts=0 is not a positive whole number"),
        ({"num_attention_heads": "32"}, "num_attention_heads='32' is not a positive whole number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is neither true nor false"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok=200 is more than the 128 experts"),
        ({"num_key_value_heads": 5}, "num_attention_heads=32 is no multiple of num_key_value_heads=5"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        geometry({**QWEN3_30B_A3B, **change})


def test_files_that_are_not_there_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        read_geometry(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_geometry(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="expected an object, found list"):
        read_geometry(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    assert read_geometry(tmp_path).layers == 48
