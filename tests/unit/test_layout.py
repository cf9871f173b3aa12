"""Layouts that cannot be are refused with the values and what to change; those that can pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megasapo import config
from megasapo.config import ConfigError
from megasapo.geometry import Geometry
from megasapo.layout import (
    check_layout,
    check_run,
    check_tokens,
    fewest_ranks,
    layout_problems,
    padded_vocab_size,
    slot_multiple,
)
from megasapo.sections import ParallelConfig

DENSE = Geometry(
    model_type="qwen3",
    hidden=64,
    heads=8,
    kv_heads=4,
    head_dim=16,
    vocab=515,
    tied=False,
    moe_layers=(False,) * 12,
    ffn=96,
)
MOE = replace(
    DENSE, model_type="qwen3_moe", moe_layers=(False,) + (True,) * 11, experts=8, top_k=2, moe_ffn=48, shared_ffn=20
)


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        ({"tp": 4, "pp": 2}, 12, r"tp\(4\)\*pp\(2\)\*cp\(1\)=8 does not divide world size 12; start a multiple of 8"),
        ({"tp": 2}, 1, r"tp\(2\)\*pp\(1\)\*cp\(1\)=2 does not divide world size 1;"),
        ({"cp": 3}, 4, r"tp\(1\)\*pp\(1\)\*cp\(3\)=3 does not divide world size 4; .* lower tp, pp or cp"),
        ({"pp": 2, "ep": 4}, 4, r"ep\(4\)\*etp\(1\)=4 does not divide the 2 ranks of a pipeline stage"),
        ({"ep": 2, "etp": 2}, 2, r"ep\(2\)\*etp\(2\)=4 does not divide the 2 ranks .*\(world size 2 / pp\(1\)\)"),
        ({"vpp": 2}, 1, r"parallel.vpp=2 interleaves the stages of a pipeline, but pp=1 has none; use vpp=1"),
    ],
)
def test_ranks_that_cannot_form_the_layout(sizes: dict[str, int], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(ParallelConfig(**sizes), world_size)


@pytest.mark.parametrize(
    ("sizes", "model", "message"),
    [
        (
            {"tp": 16},
            MOE,
            r"parallel.tp=16 does not divide the model's num_attention_heads=8; use one of \[1, 2, 4, 8\]",
        ),
        ({"tp": 8}, MOE, r"parallel.tp=8 does not divide the model's num_key_value_heads=4; use one of \[1, 2, 4\]"),
        (
            {"pp": 8},
            MOE,
            r"parallel.pp=8 does not divide the model's num_hidden_layers=12; use one of \[1, 2, 3, 4, 6,",
        ),
        (
            {"pp": 2, "vpp": 4},
            MOE,
            r"pp\(2\)\*vpp\(4\)=8 .* num_hidden_layers=12; with pp=2 use a vpp of \[1, 2, 3, 6\]",
        ),
        ({"ep": 3}, MOE, r"parallel.ep=3 does not divide the model's num_experts=8; use one of \[1, 2, 4, 8\]"),
        (
            {"etp": 5},
            MOE,
            r"parallel.etp=5 does not divide the model's moe_intermediate_size=48; use one of \[1, 2, 3,",
        ),
        ({"ep": 2}, DENSE, r"parallel.ep=2, but model_type='qwen3' has no experts; use ep=1"),
        ({"etp": 2}, DENSE, r"parallel.etp=2, but model_type='qwen3' has no experts; use etp=1"),
        (
            {"tp": 4},
            replace(MOE, ffn=98),
            r"parallel.tp=4 does not divide the model's intermediate_size=98; use one of",
        ),
        (
            {"tp": 4},
            replace(MOE, shared_ffn=18),
            r"tp=4 does not divide the model's shared_expert_intermediate_size=18",
        ),
        (
            {"tp": 4},
            replace(MOE, vocab=5),
            r"tp=4 pads the vocabulary of 5 to 8, 2 a rank, which leaves rank 3 nothing",
        ),
    ],
)
def test_models_that_the_layout_cannot_cut(sizes: dict[str, int], model: Geometry, message: str) -> None:
    parallel = ParallelConfig(**sizes)
    with pytest.raises(ConfigError, match=message):
        check_layout(parallel, 15 * fewest_ranks(parallel), model)


@pytest.mark.parametrize(
    ("sizes", "world_size", "model"),
    [
        ({}, 1, None),
        ({}, 3, DENSE),
        ({"tp": 2, "ep": 2}, 2, MOE),
        ({"tp": 2, "pp": 2, "ep": 4}, 8, MOE),
        ({"tp": 4, "cp": 2, "pp": 3, "vpp": 2, "ep": 4, "etp": 2}, 24, MOE),
        ({"tp": 4, "pp": 12}, 48, replace(MOE, moe_layers=(True,) * 12, ffn=1)),  # no layer uses that ffn
    ],
)
def test_possible_layouts_pass(sizes: dict[str, int], world_size: int, model: Geometry | None) -> None:
    check_layout(ParallelConfig(**sizes), world_size, model)


def test_all_problems_are_found_and_counted_by_kind() -> None:
    kinds = [p.kind for p in layout_problems(ParallelConfig(tp=8, pp=5, ep=3, vpp=2), 7, MOE)]
    assert kinds == [
        "tp*pp*cp does not divide the ranks",
        "pp does not divide num_hidden_layers",
        "ep does not divide num_experts",
        "tp does not divide num_key_value_heads",
        "tp does not divide shared_expert_intermediate_size",
    ]


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        ({}, 1),
        ({"ep": 2}, 2),
        ({"tp": 2, "pp": 2, "ep": 2}, 4),
        ({"tp": 2, "cp": 2, "ep": 2, "etp": 3}, 12),
        ({"cp": 3, "pp": 2, "vpp": 2}, 6),
    ],
)
def test_fewest_ranks_pass_and_fewer_do_not(sizes: dict[str, int], ranks: int) -> None:
    parallel = ParallelConfig(**sizes)
    assert fewest_ranks(parallel) == ranks
    passing = [world for world in range(1, 3 * ranks + 1) if not list(layout_problems(parallel, world, None))]
    assert passing == [ranks, 2 * ranks, 3 * ranks]


def test_padded_vocabulary() -> None:
    assert [padded_vocab_size(515, tp) for tp in (1, 2, 4, 8)] == [515, 516, 516, 520]


def settings(tmp_path: Path, *overrides: str) -> config.Config:
    raw: dict[str, Any] = {"model": {"path": str(tmp_path)}, "data": {"max_prompt_tokens": 100}}
    raw |= {"rollout": {"max_new_tokens": 156}, "train": {"micro_batch_tokens": 256}}
    return config.from_dict(raw, list(overrides))


def test_the_longest_sequence_must_fit_when_context_parallelism_rounds_it_up(tmp_path: Path) -> None:
    check_tokens(settings(tmp_path))  # 255 slots
    check_tokens(settings(tmp_path, "parallel.cp=8"))  # 256, a multiple of 16
    with pytest.raises(
        ConfigError, match=r"micro_batch_tokens=256 is less than the 264 slots .*2\*cp=24; raise it to 264"
    ):
        check_tokens(settings(tmp_path, "parallel.cp=12"))
    with pytest.raises(ConfigError, match=r"max_prompt_tokens\(100\) .*max_new_tokens\(157\) - 1; raise it to 256"):
        check_tokens(settings(tmp_path, "rollout.max_new_tokens=157", "train.micro_batch_tokens=255"))
    assert [slot_multiple(cp) for cp in (1, 2, 3)] == [1, 4, 6]


def test_a_run_is_checked_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        check_run(settings(tmp_path), 1)
    sizes = {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 96, "vocab_size": 515, "num_hidden_layers": 12}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert check_run(settings(tmp_path), 3).layers == 12
    with pytest.raises(ConfigError, match="does not divide world size 3"):
        check_run(settings(tmp_path, "parallel.tp=2"), 3)
    with pytest.raises(ConfigError, match="num_key_value_heads=4"):
        check_run(settings(tmp_path, "parallel.tp=8"), 8)
