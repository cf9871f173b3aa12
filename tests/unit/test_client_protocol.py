"""What is read out of an answer: versions over spans, routed experts, and the sizes a model allows."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasapo.errors import UserError
from megasapo.rollout.limits import ModelLimits
from megasapo.rollout.protocol import (
    UNSTAMPED,
    BadAnswer,
    RolloutError,
    generate_request,
    parse_version,
    read_completions,
)
from megasapo.routing.validate import RoutingRule
from megasapo.types import SamplingParams

RULE = RoutingRule(num_layers=2, moe_layers=(0, 1), num_experts=4, top_k=2)
ROUTING = np.arange(3 * 2 * 2, dtype=np.int32).reshape(3, 2, 2) % 4  # 2 prompt tokens, 2 output tokens: 3 rows


def answer(**meta: Any) -> dict[str, Any]:
    fields = {
        "finish_reason": {"type": "stop", "matched": 8},
        "weight_version": "3",
        "output_token_logprobs": [[-0.25, 7, None], [-1.5, 8, None]],
        "routed_experts": base64.b64encode(ROUTING.tobytes()).decode(),
    }
    return {"text": "", "output_ids": [7, 8], "meta_info": fields | meta}


def read(body: Any, routed: RoutingRule | None = None) -> Any:
    return read_completions(body, [(1, 2)], [SamplingParams(max_new_tokens=2)], routed)[0]


def test_one_answer_may_come_without_a_list() -> None:
    completion = read(answer())
    assert completion.output_ids == (7, 8)
    assert completion.finish_reason == "stop"
    np.testing.assert_array_equal(completion.logprobs, np.float32([-0.25, -1.5]))
    assert completion.logprobs.dtype == np.float32
    assert completion.routed_experts is None


def test_versions_are_the_extremes_of_the_spans() -> None:
    spans = [{"version": v, "start": 0, "end": 1} for v in ("4", "6", "5")]
    completion = read(answer(weight_versions=spans))
    assert (completion.version_min, completion.version_max) == (4, 6)


@pytest.mark.parametrize(
    ("stamp", "version"), [("12", 12), (12, 12), ("default", -1), ("-3", -1), ("²", -1), (None, -1)]
)
def test_only_plain_numbers_are_versions(stamp: Any, version: int) -> None:
    assert parse_version(stamp) == version
    assert UNSTAMPED == -1


def test_routed_experts_have_a_row_for_every_token_but_the_last() -> None:
    np.testing.assert_array_equal(read([answer()], RULE).routed_experts, ROUTING)


def test_absent_routing_says_which_flag_is_missing() -> None:
    with pytest.raises(RolloutError, match="--enable-return-routed-experts") as caught:
        read(answer(routed_experts=None), RULE)
    assert not isinstance(caught.value, BadAnswer)


def test_routing_of_another_model_is_not_retried() -> None:
    with pytest.raises(RolloutError, match=r"12 ids, no multiple of 5 layers \* top-k 2") as caught:
        read(answer(), RoutingRule(num_layers=5, moe_layers=tuple(range(5)), num_experts=4, top_k=2))
    assert not isinstance(caught.value, BadAnswer)


@pytest.mark.parametrize("encoded", ["AAA", "!!!!", 5])
def test_broken_routing_is_a_bad_answer(encoded: Any) -> None:
    with pytest.raises(BadAnswer, match="routed_experts"):
        read(answer(routed_experts=encoded), RULE)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (RoutingRule(3, (1, 2), num_experts=4, top_k=2), (3, 2, 2)),  # 3 rows of the MoE layers
        (RoutingRule(6, (0, 1, 2), num_experts=4, top_k=2), (1, 6, 2)),  # fewer rows of all layers
        (RoutingRule(2, (1,), num_experts=4, top_k=2), (3, 2, 2)),
        (RoutingRule(3, (0, 1, 2), num_experts=4, top_k=1), (4, 3, 1)),  # a row for the last token too
    ],
)
def test_rows_follow_from_the_number_of_ids(rule: RoutingRule, shape: tuple[int, ...]) -> None:
    assert read(answer(), rule).routed_experts.shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_ids": [7, "8"]}, "not all non-negative integers"),
        ({"output_ids": [7, True]}, "not all non-negative integers"),
        ({"output_ids": []}, "0 output tokens"),
        ({"output_ids": [7, 8, 9]}, "3 output tokens for max_new_tokens=2"),
        ({"output_ids": [8, 7]}, "do not belong to output_ids"),
        ({"meta_info": {}}, "lacks a field"),
        ({"meta_info": None}, "lacks a field"),
    ],
)
def test_malformed_answers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        read(answer() | change)


def test_versions_without_numbers_are_a_bad_answer() -> None:
    """Asked again as any other malformed answer is, and not the end of the run."""
    with pytest.raises(BadAnswer, match="invalid literal for int"):
        read(answer(weight_versions=[{"version": "7", "start": "", "end": 2}]))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), None, "x"])
def test_logprobs_must_be_finite_numbers(value: Any) -> None:
    with pytest.raises(BadAnswer, match=r"finite|not numbers"):
        read(answer(output_token_logprobs=[[-0.25, 7, None], [value, 8, None]]))


def test_prompts_and_sampling_must_match() -> None:
    with pytest.raises(ValueError, match="2 prompts but 1"):
        generate_request([(1,), (2,)], [SamplingParams(max_new_tokens=1)], return_routed_experts=False)


def test_limits_come_from_config_json(tmp_path: Path) -> None:
    config = {"vocab_size": 50, "max_position_embeddings": 9, "num_hidden_layers": 3, "num_local_experts": 6}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2}))
    limits = ModelLimits.read(tmp_path)
    assert limits.routing_rule() == RoutingRule(num_layers=3, moe_layers=(0, 1, 2), num_experts=6, top_k=2)
    limits.check([(1,) * 5], [SamplingParams(max_new_tokens=4)])
    with pytest.raises(ValueError, match="max_position_embeddings=9"):
        limits.check([(1,) * 5], [SamplingParams(max_new_tokens=5)])


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    config = {"vocab_size": 50, "max_position_embeddings": 9, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RolloutError, match="no experts"):
        ModelLimits.read(tmp_path).routing_rule()


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_an_unusable_config_json_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        ModelLimits.read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "dense"),
    [
        ({"mlp_only_layers": [1]}, (1,)),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"first_k_dense_replace": 2}, (0, 1)),
        ({}, ()),
    ],
)
def test_dense_layers_and_the_engine_that_ignores_them(tmp_path: Path, fields: Any, dense: tuple[int, ...]) -> None:
    config = {"vocab_size": 50, "max_position_embeddings": 9, "num_hidden_layers": 3, "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(config | fields | {"model_type": "qwen3_moe"}))
    limits = ModelLimits.read(tmp_path)
    assert limits.dense_layers == dense
    limits.check_engine("embedded")
    if dense:
        with pytest.raises(RolloutError, match=r"dense layers \[.*use rollout\.engine=embedded"):
            limits.check_engine("sglang")
    else:
        limits.check_engine("sglang")
