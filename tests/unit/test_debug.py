"""The debugger without a model: what a run dumped is read, weights are found, passes made by hand are compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megasapo import debug
from megasapo.config import ConfigError
from megasapo.data.files import DataError
from megasapo.debug import compare, text
from megasapo.debug.passes import CURRENT, CURRENT_HELD, NATIVE, REPLAYED, UNQUANTISED, Passes, Variant
from megasapo.debug.samples import Dumped, choose, read_samples
from megasapo.debug.weights import find
from megasapo.geometry import Geometry
from megasapo.routing.trace import TraceRow, TraceWriter

LAYERS = [1, 3]
GEOMETRY = Geometry(
    model_type="qwen3_moe",
    hidden=8,
    heads=1,
    kv_heads=1,
    head_dim=8,
    vocab=50,
    tied=False,
    moe_layers=(False, True, False, True),
    ffn=8,
    experts=4,
    top_k=2,
    moe_ffn=8,
)


def line(uid: int, sample: int, **changes: Any) -> str:
    record = {
        "uid": uid,
        "sample": sample,
        "prompt_ids": [1, 2],
        "output_ids": [3, 4, 5],
        "logprobs": [-1.0, None, -3.0],
    }
    return json.dumps(record | {"version_min": 4, "version_max": 5} | changes) + "\n"


def dump(run_dir: Path, name: str, *lines: str) -> None:
    (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
    (run_dir / "rollouts" / name).write_text("".join(lines))


def test_samples_of_all_leaders_in_order_of_uid_with_their_trace(tmp_path: Path) -> None:
    dump(tmp_path, "step_00000007.part-0-of-2.jsonl", line(3, 0), line(3, 1))
    dump(tmp_path, "step_00000007.part-1-of-2.jsonl", line(2, 1), line(2, 0))
    routing = np.array([[[0, 1], [2, 3]], [[1, 3], [0, 2]]], dtype=np.uint8)
    writer = TraceWriter(
        tmp_path / "routing" / "trace", rate=1.0, budget_bytes=1 << 20, layers=LAYERS, num_experts=4, top_k=2
    )
    writer.add(step=7, sequences=[TraceRow(5, "rollout", 4, 4, 2, routing), TraceRow(4, "learner", 4, 4, 2, routing)])
    writer.close()
    samples = read_samples(tmp_path, 7, group_size=2, geometry=GEOMETRY)
    assert [(s.number, s.uid) for s in samples] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    sample = samples[1]
    assert sample.tokens.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(sample.rollout_logp, np.float32([np.nan, -1, np.nan, -3]))
    assert sample.rollout_logp[sample.response].tolist()[::2] == [-1, -3]
    assert (sample.prompt_tokens, sample.version_min, sample.version_max) == (2, 4, 5)
    assert sample.routing is not None
    assert sample.routing[:2].tolist() == routing.tolist()
    assert (sample.routing[2:] == -1).all(), "what the server did not return is unknown"
    assert sample.routing.shape == (4, 2, 2)
    assert [s.routing is None for s in samples] == [True, False, True, True], "the learner's rows are not the server's"
    assert [s.uid for s in choose(samples, number=None, uid=None, limit=3)] == [4, 5, 6]
    assert [s.uid for s in choose(samples, number=2, uid=None, limit=1)] == [6]
    assert [s.number for s in choose(samples, number=None, uid=7, limit=1)] == [3]
    with pytest.raises(ConfigError, match="no uid 2: it has samples 0 to 3, with uids 4-7"):
        choose(samples, number=None, uid=2, limit=1)


def test_the_first_weights_are_those_that_the_run_started_from(tmp_path: Path) -> None:
    sizes = {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 96, "vocab_size": 515, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    dump(tmp_path, "step_00000001.jsonl", line(0, 0, version_min=0, version_max=0))
    for started_from in ("", str(tmp_path / "converted")):
        (tmp_path / "config.yaml").write_text(f"model: {{path: {tmp_path}, load: '{started_from}'}}")
        plan = debug._plan(debug._parser().parse_intermixed_args([str(tmp_path), "--step=1"]))
        assert plan.weights.behaviour == {0: Path(started_from or tmp_path)}


@pytest.mark.parametrize(
    ("text", "said"), [("", "model is required"), ("model: [", "not valid YAML"), ("7", "mapping")]
)
def test_a_damaged_configuration_is_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"config.yaml: .*{said}"):
        debug._plan(debug._parser().parse_intermixed_args([str(tmp_path), "--step=1"]))


def test_steps_that_are_not_there_and_broken_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("log.keep_rollouts=true")):
        read_samples(tmp_path, 1, group_size=2, geometry=GEOMETRY)
    for step in (1, 2, 3, 9):
        dump(tmp_path, f"step_{step:08d}.jsonl", line(0, 0))
    with pytest.raises(ConfigError, match="has no step 4; it has 1-3, 9"):
        read_samples(tmp_path, 4, group_size=2, geometry=GEOMETRY)
    for changes, message in [
        ({"logprobs": [-1.0]}, "step_00000001.jsonl:2: not a sample as a run dumps it"),
        ({"output_ids": [3, 4, 50]}, "step_00000001.jsonl:2: token ids up to 50, and the model has 50"),
        ({"version_min": None}, "step_00000001.jsonl:2: not a sample"),
        ({"prompt_ids": []}, "step_00000001.jsonl:2: not a sample"),
    ]:
        dump(tmp_path, "step_00000001.jsonl", line(0, 0), line(0, 1, **changes))
        with pytest.raises(DataError, match=message):
            read_samples(tmp_path, 1, group_size=2, geometry=GEOMETRY)
    dump(tmp_path, "step_00000001.jsonl")
    with pytest.raises(ConfigError, match="is empty"):
        read_samples(tmp_path, 1, group_size=2, geometry=GEOMETRY)


def test_weights_in_every_form_and_how_to_keep_them(tmp_path: Path) -> None:
    for path, mark in [
        ("checkpoints/step_00000002", "megasapo.json"),
        ("checkpoints/step_00000003", "megasapo.json"),
        ("checkpoints/step_00000004", "unfinished"),
        ("hf_00000003", "config.json"),
        ("weights/v6", "config.json"),
        ("hf", "config.json"),
    ]:
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / mark).touch()
    expected = {"0": "start", "2": "checkpoints/step_00000002", "3": "hf_00000003", "6": "weights/v6"}
    start = str(tmp_path / "start")
    assert {step: find(tmp_path, start, step) for step in expected} == {s: tmp_path / p for s, p in expected.items()}
    with pytest.raises(
        ConfigError, match=r"after step 4 .* not kept: .* 2 \(.*step_00000002\), 3 .*train.export_every=1"
    ):
        find(tmp_path, start, "4")
    (tmp_path / "done").write_text(json.dumps({"command": "train", "step": 8}))
    assert find(tmp_path, start, "8") == tmp_path / "hf"
    assert find(tmp_path, start, str(tmp_path / "hf_00000003")) == tmp_path / "hf_00000003"
    with pytest.raises(ConfigError, match="neither a step, nor an HF directory, nor a training checkpoint"):
        find(tmp_path, start, str(tmp_path / "checkpoints" / "step_00000004"))


# one sample: 2 prompt tokens, 3 of response; the server routed by ROLLOUT, the learner by NATURAL
ROLLOUT = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]], [[-1, -1], [-1, -1]]], dtype=np.int16)
NATURAL = np.array([[[1, 0], [3, 2]], [[0, 1], [2, 0]], [[0, 2], [1, 0]], [[3, 2], [1, 0]]], dtype=np.uint8)
HELD = np.array([[[1, 0], [3, 2]], [[0, 1], [2, 0]], [[0, 1], [2, 3]], [[3, 2], [1, 0]]], dtype=np.uint8)


def sample(routing: np.ndarray | None = ROLLOUT) -> Dumped:
    logp = np.array([np.nan, -1.0, -2.0, -3.0], dtype=np.float32)
    return Dumped(0, 11, np.array([1, 2, 3, 4, 5], dtype=np.int32), 2, logp, 4, 4, routing)


def scored(logp: list[float], choices: np.ndarray | None = NATURAL, given_up: np.ndarray | None = None) -> Any:
    return SimpleNamespace(logp=np.array([-9.0, *logp], dtype=np.float32), choices=choices, given_up=given_up)


def passes() -> Passes:
    given_up = np.arange(8, dtype=np.float32).reshape(4, 2)
    return {
        NATIVE: {0: scored([-1.0, -2.5, -3.0])},
        REPLAYED: {0: scored([-1.0, -2.25, -3.0], HELD, given_up)},
        CURRENT: {0: scored([-1.5, -2.5, -3.5])},
        CURRENT_HELD: {0: scored([-1.5, -2.5, -3.0])},
    }


def test_a_row_of_the_table_by_hand() -> None:
    row = compare.row(NATIVE, [sample()], passes(), 0.25)
    kl = (np.exp(-0.5) - 1 + 0.5) / 3
    assert row == {
        "variant": "native",
        "tokens": 3,
        "not_comparable": 0,
        "mean": pytest.approx(0.5 / 3),
        "max": 0.5,
        "kl": pytest.approx(kl),
        "beyond_tolerance": 1,
        "rerouted_tokens": 2,  # order is no difference, and the last slot's experts are unknown
        "rerouted_choices": 3,
        "slots": 4,
        "choices": 8,
    }
    assert compare.row(REPLAYED, [sample()], passes(), 0.25)["rerouted_choices"] == 0
    dense = compare.row(NATIVE, [sample(None)], {NATIVE: {0: scored([-1.0, np.nan, -3.0], None)}}, 0.25)
    assert (dense["tokens"], dense["not_comparable"], dense["max"]) == (2, 1, 0.0)
    assert "choices" not in dense


def test_first_places_by_hand() -> None:
    one, found = sample(), passes()
    assert compare.first_rerouted(NATIVE, one, found, LAYERS) == {
        "token": 1,
        "position": -1,
        "token_id": 2,
        "layer": 3,
        "expected": [2, 3],
        "chosen": [0, 2],
        "score_gap": 3.0,
    }
    assert compare.by_layer(NATIVE, [one], found, LAYERS) == {"layers": LAYERS, "natural": [1, 2], "by_itself": [0, 1]}
    beyond = compare.first_beyond(NATIVE, one, found, 0.25)
    assert beyond == {
        "token": 3,
        "position": 1,
        "token_id": 4,
        "variant": "native",
        "logprob": -2.5,
        "rollout_logprob": -2.0,
    }
    assert compare.first_beyond(NATIVE, one, found, 0.75) is None
    # without a trace the native pass is what others are compared with
    assert compare.first_rerouted(NATIVE, sample(None), found, LAYERS) is None
    other = Variant("model.dtype=float32", "behaviour", "native")
    found[other] = {0: scored([-1.0, -2.0, -3.0], HELD)}
    first = compare.first_rerouted(other, sample(None), found, LAYERS)
    assert first is not None
    assert (first["token"], first["layer"], first["expected"], first["chosen"]) == (2, 1, [0, 2], [0, 1])


def test_terms_by_hand_add_up() -> None:
    found = compare.terms([sample()], passes())
    assert found is not None
    whole = np.array([-0.5, -0.5, -0.5])
    assert (found["tokens"], found["mean"], found["variance"]) == (3, whole.mean(), whole.var())
    assert {name: term["mean"] for name, term in found["terms"].items()} == pytest.approx(
        {"engine": -0.25 / 3, "mismatch": -0.25 / 3, "update": -0.5 / 3, "drift": -0.5 / 3}
    )
    assert [term["share"] for term in found["terms"].values()] == [None] * 4, "nothing varies"
    two = {NATIVE: {0: scored([-1.0, -2.5, -3.0])}, CURRENT: {0: scored([-1.5, -2.5, -4.0], None)}}
    found = compare.terms([sample(None)], two)
    assert found is not None
    assert list(found["terms"]) == ["engine and mismatch", "update"]
    d, engine = np.array([-0.5, -0.5, -1.0]), np.array([0, -0.5, 0])
    share = ((d - d.mean()) * (engine - engine.mean())).mean() / d.var()
    assert found["terms"]["engine and mismatch"]["share"] == pytest.approx(share)
    assert sum(term["share"] for term in found["terms"].values()) == pytest.approx(1)


def unquantised(routing: str) -> Variant:
    return Variant(UNQUANTISED, "behaviour", routing)


def test_fp8_is_what_parts_two_passes_with_the_same_experts() -> None:
    one, found = sample(), passes()
    assert compare.fp8_tokens(one, found) is None
    found[unquantised("R2")] = {0: scored([-9.0, -9.0, -9.0])}
    found[unquantised("native")] = {0: scored([-9.0, -9.0, -9.0])}
    found[unquantised("R3")] = {0: scored([-1.25, -2.0, np.nan])}
    terms = compare.terms([one], found)
    assert terms is not None
    # without FP8 -.25, 0 from the server; FP8 then adds .25, -.25; the last token has no logprob
    means = {name: term["mean"] for name, term in terms["terms"].items()}
    assert terms["tokens"] == 2
    assert means == {"engine": -0.125, "fp8": 0.0, "mismatch": -0.125, "update": -0.25, "drift": 0.0}
    tokens = compare.fp8_tokens(one, found)
    assert tokens is not None
    assert [t["unquantised_logprob"] for t in tokens] == [-1.25, -2.0, None]
    assert [t["logprob"] for t in tokens] == [-1.0, -2.25, -3.0]
    assert (tokens[1]["token"], tokens[1]["position"], tokens[1]["token_id"]) == (3, 1, 4)
    shown = text._fp8(tokens, lambda ids: f"<{ids[0]}>")
    assert [line.split(": ")[1] for line in shown[2:]] == ["-1.0000, -1.2500, +0.25", "-2.2500, -2.0000, -0.25"]


def test_fp8_without_a_trace_holds_the_experts_of_the_native_pass() -> None:
    one, found = sample(None), {NATIVE: {0: scored([-1.0, -2.5, -3.0])}}
    found[unquantised("native")] = {0: scored([-9.0, -9.0, -9.0])}
    found[unquantised("R2")] = {0: scored([-1.0, -2.0, -3.5])}
    terms = compare.terms([one], found)
    assert terms is not None
    assert {name: term["mean"] for name, term in terms["terms"].items()} == {
        "engine and mismatch": pytest.approx(-0.5 / 3),
        "fp8": 0.0,
    }
    del found[unquantised("R2")]  # as of a model without experts
    found[unquantised("native")] = {0: scored([-1.0, -2.0, -3.0])}
    terms = compare.terms([one], found)
    assert terms is not None
    assert terms["terms"]["fp8"]["mean"] == pytest.approx(-0.5 / 3)


def test_the_text_names_token_layer_and_experts() -> None:
    one, found = sample(), passes()
    natural = [NATIVE, CURRENT]
    findings = {
        "variants": [compare.row(v, [one], found, 0.25) for v in found],
        "by_layer": {str(v): compare.by_layer(v, [one], found, LAYERS) for v in natural},
        "terms": compare.terms([one], found),
    }
    about = {"number": 0, "uid": 11, "prompt_tokens": 2, "response_tokens": 3, "version_min": 4, "version_max": 5}
    about |= {"routing_traced": True, "routing_shift": -1}
    about["first_rerouted"] = {"native": compare.first_rerouted(NATIVE, one, found, LAYERS)}
    about["fp8"] = None
    about["first_beyond"] = {"native": compare.first_beyond(NATIVE, one, found, 0.25), "R3": None}
    record = {"run": "runs/x", "step": 7, "samples_in_step": 9, "tolerance": 0.25, "weights": ["w4"]}
    record |= {"current_weights": "w5", "model_layers": LAYERS, "overall": findings, "samples": [about | findings]}
    shown = text.render(record, lambda ids: f"<{ids[0]}>")
    for expected in (
        "runs/x step 7: 1 of 9 samples",
        "sampled with version 4 to 5 and scored with the first",
        "the server's row t is the learner's row t-1",
        "token 1 (prompt, '<2>'), layer 3: expected [2, 3], chosen [0, 2], router scores 3 apart",
        "token 3 (response 1, '<4>'): -2.5000, the server's -2.0000",
        "2/4, 3/8 (37.5%)",
    ):
        assert expected in shown, f"{expected!r} is not in\n{shown}"
    record["samples"] = [about | findings, about | findings | {"number": 1}]
    several = text.render(record, lambda ids: f"<{ids[0]}>")
    assert several.count("token 1 layer 3, token 3 (response 1, '<4>')  ROUTING SHIFTED by -1") == 2
