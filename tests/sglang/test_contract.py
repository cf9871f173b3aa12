"""The embedded server and a real SGLang keep one contract: same fields, codes, versions, tokens, routing and weights.

Each is compared with transformers and with the words of the contract, and so with the other.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from megasapo.geometry import read_geometry
from megasapo.publish import Bucket
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.online import OnlineDelivery
from megasapo.rollout.protocol import INCOMPLETE, RolloutError
from megasapo.rollout.spawn import server_command
from megasapo.routing.validate import RoutingRule, offset_of, unknown_rows, validate
from megasapo.sections import RolloutConfig
from megasapo.types import SamplingParams
from tests.sglang.calls import (
    LONG,
    PROMPTS,
    TIMEOUT_S,
    assert_serves,
    flush,
    generate,
    in_flight,
    long_request,
    paused,
    post,
    publish,
)
from tests.sglang.conftest import Contract, sglang_python
from tests.sglang.reference import greedy_of, logprobs_of, routing_of
from tests.sglang.router import routing

META = {
    *(
        "id",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "cached_tokens",
        "weight_version",
        "weight_versions",
    ),
    *("num_retractions", "input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length"),
}


# --- tokens, logprobs, routing ---


def test_the_two_models_differ_in_what_they_say(contract: Contract) -> None:
    for prompt in PROMPTS:
        assert greedy_of(contract.old, prompt) != greedy_of(contract.new, prompt)


def test_greedy_tokens_and_their_logprobs_are_transformers(contract: Contract) -> None:
    assert contract.fleet.version is None
    assert_serves(contract, contract.old, -1)


def test_whoever_lacks_the_new_key_is_turned_away_and_it_can_be_read_nowhere(contract: Contract) -> None:
    file = contract.run_dir / "api_key"
    key, url = file.read_text(), contract.fleet.urls[0]
    assert file.stat().st_mode & 0o777 == 0o600
    for call, body in (("/generate", {"input_ids": [1]}), ("/pause_generation", {"mode": "abort"})):
        assert httpx.post(url + call, json=body, trust_env=False, timeout=TIMEOUT_S).status_code == 401
    assert contract.http.get("/model_info").status_code == 200
    lines = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]
    assert any(str(file) in (line or ()) for line in lines)  # the server's
    assert not [line for line in lines if key in " ".join(line or ())]
    written = {}
    for path in contract.run_dir.rglob("*"):
        with suppress(FileNotFoundError):  # the fleet replaces servers.json every other second
            if path.is_file() and path != file:
                written[path] = path.read_bytes()
    assert "server_0.log" in {path.name for path in written}
    assert not [path for path, content in written.items() if key.encode() in content]


@pytest.mark.sglang
def test_a_router_in_front_changes_nothing(contract: Contract, tmp_path: Path) -> None:
    key = (contract.run_dir / "api_key").read_text()
    with routing(contract.fleet.urls, key, tmp_path / "router.log") as url:
        cfg = contract.fleet.cfg.model_copy(update={"router": url})
        with Fleet.connect(cfg, contract.fleet.urls, contract.old) as routed:
            assert_serves(replace(contract, fleet=routed), contract.old, -1)


def test_routed_experts_are_transformers(contract: Contract) -> None:
    for prompt, completion in zip(PROMPTS, generate(contract, routed=True), strict=True):
        assert completion.routed_experts is not None
        expected = routing_of(contract.old, prompt, completion.output_ids)
        np.testing.assert_array_equal(completion.routed_experts, expected)


def test_routing_from_the_prefix_cache_is_the_same_and_passes_validation(contract: Contract) -> None:
    """SGLang does not run the tokens of the second request's prompt again, and still has their rows."""
    rule = RoutingRule.of(read_geometry(contract.old))
    prompt = tuple(range(3, 43))

    body = {"input_ids": list(prompt), "sampling_params": GREEDY_FIELDS}
    flush(contract)
    for _ in range(2):
        (completion,) = generate(contract, routed=True, prompts=[prompt])
        assert completion.routed_experts is not None
        tokens = len(prompt) + len(completion.output_ids)
        found = validate(completion.routed_experts, tokens=tokens, rule=rule, where=contract.engine)
        assert unknown_rows(found, tokens) == 0
        expected = routing_of(contract.old, prompt, completion.output_ids)
        np.testing.assert_array_equal(found, expected)
        assert offset_of(found, expected) == 0
        if contract.engine == "sglang":  # what the next request finds
            assert post(contract, body)["meta_info"]["cached_tokens"] > len(prompt) // 2


def test_sampled_logprobs_are_at_the_sampling_temperature(contract: Contract) -> None:
    sampling = SamplingParams(max_new_tokens=16, temperature=0.7, ignore_eos=True)
    for prompt, completion in zip(PROMPTS, generate(contract, sampling), strict=True):
        expected = logprobs_of(contract.old, prompt, completion.output_ids, temperature=0.7)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)


def test_a_stop_token_is_the_last_of_the_output(contract: Contract) -> None:
    prompt = PROMPTS[0]
    greedy = greedy_of(contract.old, prompt)
    stop = greedy[4]
    until = greedy.index(stop) + 1
    answer = post(contract, {"input_ids": list(prompt), "sampling_params": {**GREEDY_FIELDS, "stop_token_ids": [stop]}})
    assert answer["output_ids"] == list(greedy[:until])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert len(answer["meta_info"]["output_token_logprobs"]) == until
    sampling = {**GREEDY_FIELDS, "stop_token_ids": [stop], "ignore_eos": True}  # which takes all stop tokens for eos
    on = post(contract, {"input_ids": list(prompt), "sampling_params": sampling})
    assert on["output_ids"][: len(greedy)] == list(greedy)
    assert on["meta_info"]["finish_reason"] == {"type": "length", "length": 16}


# --- fields ---

GREEDY_FIELDS = {"max_new_tokens": 16, "temperature": 0.0}


def test_field_names_and_the_shape_of_answers(contract: Contract) -> None:
    one = post(contract, {"input_ids": [5, 6, 7], "sampling_params": GREEDY_FIELDS, "rid": "mine"})
    assert set(one) == {"text", "output_ids", "meta_info"}
    meta = one["meta_info"]
    assert set(meta) >= META
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("mine", 3, 16)
    assert meta["output_token_logprobs_length"] == 16
    assert meta["finish_reason"] == {"type": "length", "length": 16}
    assert [entry[1] for entry in meta["output_token_logprobs"]] == one["output_ids"]
    assert meta["weight_versions"] == [{"version": meta["weight_version"], "start": 0, "end": 16}]
    many = post(contract, {"input_ids": [[5, 6, 7], [8]], "sampling_params": GREEDY_FIELDS})
    assert [m["meta_info"]["prompt_tokens"] for m in many] == [3, 1]
    assert many[0]["output_ids"] == one["output_ids"]


def test_prompt_logprobs_begin_with_none(contract: Contract) -> None:
    prompt = PROMPTS[1]
    answer = post(contract, {"input_ids": list(prompt), "sampling_params": GREEDY_FIELDS, "logprob_start_len": 0})
    entries = answer["meta_info"]["input_token_logprobs"]
    assert [e[1] for e in entries] == list(prompt)
    assert entries[0][0] is None
    expected = logprobs_of(contract.old, prompt[:1], prompt[1:])
    np.testing.assert_allclose([e[0] for e in entries[1:]], expected, atol=1e-3)


def test_a_stream_is_cumulative(contract: Contract) -> None:
    events = []
    body = {"input_ids": [5, 6, 7], "sampling_params": GREEDY_FIELDS, "stream": True}
    with contract.http.stream("POST", "/generate", json=body) as response:
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                events.append(line.removeprefix("data: "))
    assert events[-1] == "[DONE]"
    outputs = [json.loads(e)["output_ids"] for e in events[:-1]]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(outputs))
    assert outputs[-1] == list(greedy_of(contract.old, PROMPTS[0]))


def test_model_and_server_say_who_they_are(contract: Contract) -> None:
    for path in ("/model_info", "/get_model_info"):
        info = contract.http.get(path).json()
        assert (info["model_path"], info["weight_version"]) == (str(contract.old), "default")
    for path in ("/server_info", "/get_server_info"):
        info = contract.http.get(path).json()
        assert (info["tp_size"], info["dp_size"]) == (1, 1)
    assert contract.http.get("/health").status_code == 200
    assert contract.http.get("/health_generate").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input_ids": []},
        {"input_ids": [["a"]]},
        {"input_ids": [[1, 2]], "sampling_params": {"temperature": -1}},
        {"input_ids": [[1, 2]], "sampling_params": {"max_new_tokens": -1}},
        {"input_ids": [[1, 2]], "sampling_params": {"top_p": 2}},
        {"input_ids": [[1] * 2100], "sampling_params": {"max_new_tokens": 4}},
        {"input_ids": [[1] * 2000], "sampling_params": {"max_new_tokens": 100}},
    ],
    ids=["nothing", "no prompts", "text ids", "temperature", "max_new_tokens", "top_p", "long prompt", "long answer"],
)
def test_bad_requests_are_400_and_the_server_lives_on(contract: Contract, body: dict[str, Any]) -> None:
    response = contract.http.post("/generate", json=body)
    assert response.status_code == 400
    answer = response.json()
    assert answer.get("error", answer)["message"]
    assert contract.http.get("/health").status_code == 200


def test_a_body_that_is_not_json_is_400(contract: Contract) -> None:
    response = contract.http.post("/generate", content=b'{"input', headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert contract.http.post("/no_such_endpoint", json={}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/update_weights_from_disk", {"model_path": "/nonexistent"}),
        ("/update_weights_from_distributed", {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]}),
        ("/destroy_weights_update_group", {"group_name": "unknown"}),
        ("/end_weight_update", {}),
        ("/pause_generation", {"mode": "unknown"}),
    ],
)
def test_control_calls_that_cannot_be_done_are_400(contract: Contract, path: str, body: dict[str, Any]) -> None:
    response = contract.http.post(path, json=body)
    assert response.status_code == 400
    assert response.json().get("success", False) is False


# --- requests in flight ---


def abort_one(c: Contract) -> int:
    return c.http.post("/abort_request", json={"rid": "long"}).status_code


def abort_all(c: Contract) -> int:
    return c.http.post("/abort_request", json={"abort_all": True}).status_code


def pause_abort(c: Contract) -> int:
    status = c.http.post("/pause_generation", json={"mode": "abort"}).status_code
    assert c.http.post("/continue_generation", json={}).status_code == 200
    return status


@pytest.mark.parametrize("how", [abort_one, abort_all, pause_abort])
def test_an_aborted_request_is_200_with_what_it_had(contract: Contract, how: Callable[[Contract], int]) -> None:
    with in_flight(contract, long_request) as request:
        assert how(contract) == 200
        answer = request.result(TIMEOUT_S)
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(answer["output_ids"]) < LONG["max_new_tokens"]


@pytest.mark.parametrize(("mode", "flushed", "retractions"), [("in_place", 400, 0), ("retract", 200, 1)])
def test_a_paused_request_goes_on_with_the_next_version(
    contract: Contract, mode: str, flushed: int, retractions: int
) -> None:
    before = contract.http.get("/model_info").json()["weight_version"]
    after = f"{before}-{mode}"
    with ThreadPoolExecutor(1) as pool, in_flight(contract, long_request) as request:
        with paused(contract, mode):
            assert contract.http.post("/flush_cache").status_code == flushed
            waiting = pool.submit(post, contract, {"input_ids": [9], "sampling_params": GREEDY_FIELDS})
            with pytest.raises(TimeoutError):  # a request that comes during the pause waits too
                waiting.result(0.5)
            stamp = {"new_version": after, "abort_all_requests": False}
            assert contract.http.post("/update_weight_version", json=stamp).status_code == 200
            assert not request.done()
    assert waiting.result()["meta_info"]["weight_versions"] == [{"version": after, "start": 0, "end": 16}]
    meta = request.result()["meta_info"]
    assert meta["finish_reason"]["type"] == "length"
    assert meta["num_retractions"] == retractions
    first, second = meta["weight_versions"]
    assert (first["version"], second["version"]) == (before, after)
    assert first["start"] == 0
    assert 0 < first["end"] == second["start"] < second["end"] == LONG["max_new_tokens"]


def test_a_flush_is_refused_while_requests_run(contract: Contract) -> None:
    with in_flight(contract, long_request) as request:
        assert contract.http.post("/flush_cache").status_code == 400
        assert abort_all(contract) == 200
        request.result(TIMEOUT_S)
    flush(contract)


# --- weights: these come last, for they change what the server holds ---


@pytest.mark.parametrize(("method", "base"), [("disk", 10), ("distributed", 20), ("tensor", 25)])
def test_published_weights_are_the_ones_that_answer(contract: Contract, method: str, base: int) -> None:
    for version, directory in enumerate((contract.new, contract.old, contract.new), base):
        publish(contract, directory, version, method)
        assert_serves(contract, directory, version)
    if contract.engine == "embedded":  # SGLang's Qwen models know no weights by name
        name = "model.layers.2.mlp.experts.3.up_proj.weight"
        got = contract.http.post("/get_weights_by_name", json={"name": name, "truncate_size": 5}).json()
        expected = load_file(contract.new / "model.safetensors")[name][:5]
        np.testing.assert_array_equal(np.float32(got), expected.numpy())


@pytest.mark.parametrize(("method", "base"), [("disk", 30), ("distributed", 40), ("tensor", 45)])
def test_a_request_in_flight_outlives_a_publish(contract: Contract, method: str, base: int) -> None:
    publish(contract, contract.old, base, method)
    with in_flight(contract, long_request) as request:
        publish(contract, contract.new, base + 1, method)
    answer = request.result()
    spans = [s["version"] for s in answer["meta_info"]["weight_versions"]]
    assert spans == [str(base), str(base + 1)]
    boundary = answer["meta_info"]["weight_versions"][0]["end"]
    # tokens after the update follow the new weights on the prefix that the old ones made
    got = np.float32([e[0] for e in answer["meta_info"]["output_token_logprobs"][boundary : boundary + 20]])
    prefix = (5, 6, 7, *answer["output_ids"][:boundary])
    expected = logprobs_of(contract.new, prefix, tuple(answer["output_ids"][boundary : boundary + 20]))
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert_serves(contract, contract.new, base + 1)


@pytest.mark.parametrize(("method", "mode"), [("disk", "in_place"), ("distributed", "abort")])
def test_a_sample_in_flight_goes_on_after_a_publish_however_it_is_set(
    contract: Contract, method: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = 50 if method == "disk" else 60
    changed = {"on_publish": mode, "max_staleness": 1}
    cfg = contract.fleet.cfg.model_copy(update=changed)
    monkeypatch.setattr(contract.fleet, "cfg", cfg)
    monkeypatch.setattr(contract.fleet._dispatch, "_cfg", cfg)
    publish(contract, contract.old, base, method)
    with in_flight(contract, lambda c: generate(c, SamplingParams(**LONG), True, [(5, 6, 7)])) as request:
        publish(contract, contract.new, base + 1, method)
    [done] = request.result()
    (_, start, boundary), (_, again, end) = done.version_spans
    assert (done.version_min, done.version_max) == (base, base + 1)
    assert (start, end, done.finish_reason) == (0, LONG["max_new_tokens"], "length")
    assert 0 < boundary == again
    assert done.routed_experts is not None
    assert len(done.routed_experts) == 3 + len(done.output_ids) - 1
    if mode == "abort":  # the new weights have read the prefix; in place they go on with what the old ones made of it
        prefix, rest = (5, 6, 7, *done.output_ids[:boundary]), done.output_ids[boundary : boundary + 20]
        expected = logprobs_of(contract.new, prefix, rest)
        np.testing.assert_allclose(done.logprobs[boundary : boundary + 20], expected, atol=1e-3)
    flush(contract)  # the prefixes that it held are of the old weights
    assert_serves(contract, contract.new, base + 1)


@pytest.mark.parametrize(("method", "base"), [("distributed", 70), ("tensor", 75)])
def test_a_publish_given_up_midway_leaves_a_server_that_says_so(
    contract: Contract, method: str, base: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(contract, contract.old, base, method)
    real = OnlineDelivery.send

    def one_bucket(self: OnlineDelivery, bucket: Bucket) -> None:
        if self._on_the_way:
            raise RolloutError("scripted")
        real(self, bucket)

    monkeypatch.setattr(OnlineDelivery, "send", one_bucket)
    with pytest.raises(RolloutError, match=r"not published in 3 attempts: .*scripted"):
        publish(contract, contract.new, base + 1, method)
    monkeypatch.undo()
    assert contract.http.get("/model_info").json()["weight_version"] == INCOMPLETE
    assert not contract.fleet.servers[0].ready
    publish(contract, contract.new, base + 2, method)
    assert_serves(contract, contract.new, base + 2)


def test_a_failed_update_from_disk_leaves_weights_and_stamp(contract: Contract) -> None:
    publish(contract, contract.new, 50, "disk")
    body = {"model_path": str(contract.run_dir / "missing"), "weight_version": "51"}
    assert contract.http.post("/update_weights_from_disk", json=body).status_code == 400
    assert_serves(contract, contract.new, 50)


@pytest.mark.sglang
def test_sglang_reads_its_limit_of_a_health_check_where_the_run_puts_it() -> None:
    find = "import importlib.util; print(importlib.util.find_spec('sglang').submodule_search_locations[0])"
    package = Path(subprocess.check_output([sglang_python(), "-c", find], text=True).strip())
    _, limit, *_ = server_command(RolloutConfig(engine="sglang", api_key_file="key"), "m", 5)
    variable = limit.partition("=")[0]
    assert f'int(os.getenv("{variable}", 20))' in (package / "srt" / "entrypoints" / "http_server.py").read_text()
