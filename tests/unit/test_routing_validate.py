"""A server's routing: what is accepted, in which form the learner gets it, and what each refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasapo.algo.settings import resolve
from megasapo.config import ConfigError, from_dict
from megasapo.geometry import read_geometry
from megasapo.layout import check_run
from megasapo.metrics import scalars
from megasapo.rollout.sequences import to_sequences
from megasapo.rollout.spawn import with_routing
from megasapo.rollout.stats import routing_stats
from megasapo.routing.validate import RoutingError, RoutingRule, offset_of, unknown_rows, validate
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, Group, Prompt, Sample, TrainSequence
from tests.tiny import make_model

# decoder layers 0 and 2 are dense, as Qwen's decoder_sparse_step=2 makes them
MIXED = RoutingRule(num_layers=4, moe_layers=(1, 3), num_experts=8, top_k=2)
N = 6  # tokens of a sequence, 5 of which have a row


def routing(rows: int, layers: int = 4, top_k: int = 2, num_experts: int = 8, seed: int = 0) -> np.ndarray:
    """Random, without repetition inside a top-k; int32 as on the wire."""
    scores = np.random.default_rng(seed).random((rows, layers, num_experts))
    return scores.argsort(axis=2)[:, :, :top_k].astype(np.int32)


def refusal(routed: np.ndarray, rule: RoutingRule = MIXED, tokens: int = N) -> str:
    with pytest.raises(RoutingError) as caught:
        validate(routed, tokens=tokens, rule=rule, where="sample 17")
    message = str(caught.value)
    assert message.startswith("sample 17: ")
    return message


def accepted(routed: np.ndarray, rule: RoutingRule = MIXED, tokens: int = N) -> np.ndarray:
    found = validate(routed, tokens=tokens, rule=rule, where="sample 17")
    assert found.flags.c_contiguous
    return found


@pytest.mark.parametrize("rows", [0, 2, N - 1, N])
def test_moe_layers_are_cut_out_and_the_last_tokens_row_is_dropped(rows: int) -> None:
    sent = routing(rows)
    sent[:, [0, 2]] = 99  # SGLang leaves whatever its buffer holds in the rows of dense layers
    found = accepted(sent)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, sent[: N - 1, [1, 3]])


def test_a_server_may_send_the_moe_layers_alone() -> None:
    sent = routing(N - 1, layers=2)
    np.testing.assert_array_equal(accepted(sent), sent)


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, np.uint8), (257, np.int16)])
def test_ids_take_a_byte_as_long_as_one_is_enough(num_experts: int, dtype: Any) -> None:
    rule = RoutingRule(4, (1, 3), num_experts, top_k=2)
    sent = routing(N - 1, num_experts=num_experts)
    sent[0, 1] = (num_experts - 1, 0)
    found = accepted(sent, rule)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, sent[:, [1, 3]])


def test_unknown_rows_stay_minus_one_and_are_counted() -> None:
    sent = routing(3)
    sent[1] = -1
    sent[2, 3] = -1
    found = accepted(sent)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, sent[:, [1, 3]])
    assert unknown_rows(found, N) == 2 + 1 + 2 * 2  # token 1, layer 3 of token 2, and two tokens that did not come
    assert unknown_rows(accepted(routing(N)), N) == 0


def changed(at: tuple[int, int], row: tuple[int, int]) -> np.ndarray:
    sent = routing(N - 1)
    sent[at] = row
    return sent


def without_layer(layer: int) -> np.ndarray:
    sent = routing(N - 1)
    sent[:, layer] = 0
    return sent


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (
            changed((4, 3), (8, 1)),
            r"decoder layer 3, token 4: experts [8, 1] (and 0 more rows): expert ids go from 0 to 7",
        ),
        (changed((0, 1), (-2, 1)), "decoder layer 1, token 0: experts [-2, 1]"),
        (changed((2, 1), (5, 5)), "decoder layer 1, token 2: experts [5, 5] (and 0 more rows): the same expert twice"),
        (changed((2, 1), (0, 0)), "a row of zeros is one that the server did not record"),
        (changed((3, 3), (-1, 5)), "decoder layer 3, token 3: experts [-1, 5]"),
        (without_layer(3), "decoder layer 3 has expert 0 in every place: the server did not record it"),
        (routing(N - 1, layers=3), "[5, 3, 2], not integers of [tokens, 4 or 2 layers, top-k 2]"),
        (routing(N - 1, top_k=3), "[5, 4, 3], not integers"),
        (routing(N - 1).astype(np.float32), "routing is float32"),
        (routing(N - 1).reshape(-1), "routing is int32 [40]"),
        (routing(N + 1), "routing has 7 rows for 6 tokens"),
    ],
)
def test_what_is_wrong_is_named_with_layer_and_token(sent: np.ndarray, message: str) -> None:
    assert message in refusal(sent)


def test_a_dense_layer_may_hold_anything_and_a_moe_layer_expert_0_sometimes() -> None:
    sent = routing(N - 1)
    sent[:, 0] = 0
    sent[:, 2] = -7
    sent[:, 1, 0], sent[:, 1, 1] = 0, 3
    np.testing.assert_array_equal(accepted(sent), sent[:, [1, 3]])


def test_top_1_is_taken_for_unrecorded_only_when_all_of_it_is_zero() -> None:
    rule = RoutingRule(4, (1, 3), 8, top_k=1)
    zeros = np.zeros((8, 4, 1), np.int32)
    assert "every layer has expert 0 for all of 8 tokens" in refusal(zeros, rule, tokens=9)
    np.testing.assert_array_equal(accepted(zeros[:7], rule, tokens=8), 0)
    zeros[:, 3] = 1
    np.testing.assert_array_equal(accepted(zeros, rule, tokens=9)[:, 0], 0)


def test_without_validation_shape_and_range_still_hold() -> None:
    unchecked = RoutingRule(4, (1, 3), 8, 2, check=False)
    sent = changed((2, 1), (5, 5))
    np.testing.assert_array_equal(accepted(sent, unchecked), sent[:, [1, 3]])
    assert "expert ids go from 0 to 7" in refusal(changed((2, 1), (256, 1)), unchecked)
    assert "top-k 2" in refusal(routing(N - 1, top_k=3), unchecked)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_the_offset_between_two_routings_is_found(shift: int) -> None:
    truth = routing(42, layers=2, seed=3)
    server, learner = truth[1:-1].copy(), truth[1 - shift : 41 - shift].copy()
    flipped = np.random.default_rng(0).random(40) < 0.3  # engines differ in some tokens
    learner[flipped] = routing(40, layers=2, seed=4)[flipped]
    server[5:9] = -1
    assert offset_of(server.astype(np.int16), learner.astype(np.uint8)) == shift


def test_no_offset_is_claimed_where_nothing_tells_them_apart() -> None:
    same = np.repeat(routing(1, layers=1), 30, axis=0)
    assert offset_of(same, same) == 0
    assert offset_of(same[:2], same) == 0
    assert offset_of(np.full_like(same, -1), same) == 0


# --- on its way to the learner ---


def group(*routed: np.ndarray | None) -> Group:
    """A prompt of 2 tokens with a response of 4 for each routing."""
    samples = [
        Sample(Completion((7, 8, 9, 2), np.full(4, -1, np.float32), "stop", 0, 0, r), "text", float(i))
        for i, r in enumerate(routed)
    ]
    return Group(5, Prompt(0, (1, 2), "p", "a"), tuple(samples))


def sequences(of: Group, rule: RoutingRule | None) -> list[TrainSequence]:
    cfg = from_dict({"model": {"path": "m"}})
    return to_sequences([of], resolve(cfg.algo, cfg.rollout), rule)


def test_sequences_carry_the_validated_routing() -> None:
    sent = routing(N - 1)
    first, second = sequences(group(sent, None), MIXED)
    assert first.routing is not None
    np.testing.assert_array_equal(first.routing, sent[:, [1, 3]])
    assert second.routing is None
    assert [s.routing for s in sequences(group(sent, None), None)] == [None, None]


def test_wrong_routing_stops_with_the_sample() -> None:
    with pytest.raises(
        RoutingError, match=r"sample 11 \(group 5, response 1\): decoder layer 1, token 2: experts \[5, 5\]"
    ):
        sequences(group(routing(N - 1), changed((2, 1), (5, 5))), MIXED)


def test_native_fraction_counts_the_tokens_that_were_asked_for() -> None:
    half = routing(N - 1)
    half[0, 1] = -1  # one of two MoE layers of one token
    found = sequences(group(routing(2), half, None), MIXED)
    assert scalars(routing_stats(found)) == {"routing/native_frac": pytest.approx((3 + 0.5) / 10)}
    assert routing_stats(sequences(group(None, None), MIXED)) == {}


def test_servers_that_are_started_get_the_flag_once() -> None:
    flag = "--enable-return-routed-experts"
    assert with_routing(RolloutConfig(server_args=("--threads", "1"))).server_args == ("--threads", "1", flag)
    given = RolloutConfig(server_args=(flag, "--threads", "1"))
    assert with_routing(given) is given
    own = RolloutConfig(engine="sglang", spawn_command=("run.sh", "{model}", "{port}", flag))
    assert with_routing(own) is own


def test_the_rule_of_a_model_is_its_config_json(tmp_path: Path) -> None:
    moe = make_model(tmp_path / "moe", mlp_only_layers=[2])
    assert RoutingRule.of(read_geometry(moe)) == RoutingRule(4, (0, 1, 3), num_experts=8, top_k=2)
    with pytest.raises(RoutingError, match="no experts"):
        RoutingRule.of(read_geometry(make_model(tmp_path / "dense", "dense")))


@pytest.mark.parametrize("setting", ["algo.routing_replay=R2", "routing.diagnose_every=10", "routing.trace_rate=0.5"])
def test_a_dense_model_has_no_routing_to_ask_for(tmp_path: Path, setting: str) -> None:
    make_model(tmp_path / "dense", "dense")
    make_model(tmp_path / "moe")
    raw = {"rollout": {"max_new_tokens": 512}}
    check_run(from_dict(raw, [f"model.path={tmp_path / 'moe'}", setting]), 1)
    with pytest.raises(
        ConfigError, match=rf"{setting}: the model in model.path=.*has no experts.*set {setting.split('=')[0]}="
    ):
        check_run(from_dict(raw, [f"model.path={tmp_path / 'dense'}", setting]), 1)
