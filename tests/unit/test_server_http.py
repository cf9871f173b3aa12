"""The embedded server over HTTP: what it refuses, keys, streams, pausing, aborting, and what happens when it breaks."""

import asyncio
import json

import pytest
import torch

from megasapo.rollout.local import protocol
from megasapo.rollout.local.app import CONTROL_PATHS
from megasapo.rollout.local.stream import Stream
from tests.serving import serving
from tests.tiny import make_model

LONG = {"max_new_tokens": 1500, "temperature": 0, "ignore_eos": True}
SHORT = {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model_dir):
    with serving(model_dir, max_body_bytes=100_000, max_total_tokens=4096) as s:
        yield s


REFUSED = [
    ({}, "text and input_ids"),
    ({"input_ids": [5], "text": "a"}, "text and input_ids"),
    ({"input_ids": []}, "input_ids is empty"),
    ({"input_ids": [[5], []]}, "input_ids is empty"),
    ({"input_ids": [5, 512]}, "512"),
    ({"input_ids": [-1]}, "-1"),
    ({"input_ids": [1.5]}, "1.5"),
    ({"input_ids": [True]}, "True"),
    ({"input_ids": "abc"}, "expected list"),
    ({"input_ids": [5] * 2048}, "longer than the model's context length (2048 tokens)"),
    ({"input_ids": [5] * 2000, "sampling_params": {"max_new_tokens": 100}}, "maximum context length of 2048 tokens"),
    ({"input_ids": [[5], [6]], "sampling_params": [{}]}, "1 entries for 2 prompts"),
    ({"input_ids": [[5], [6]], "rid": ["a", "a"]}, "duplicates"),
    ({"input_ids": [5], "sampling_params": {"temperature": -1}}, "temperature"),
    ({"input_ids": [5], "sampling_params": {"temperature": "hot"}}, "temperature"),
    ({"input_ids": [5], "sampling_params": {"temperature": 10**400}}, "temperature"),
    ({"input_ids": [5], "sampling_params": {"top_p": 0}}, "top_p"),
    ({"input_ids": [5], "sampling_params": {"top_k": 0}}, "top_k"),
    ({"input_ids": [5], "sampling_params": {"min_p": 2}}, "min_p"),
    ({"input_ids": [5], "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
    ({"input_ids": [5], "sampling_params": {"max_new_tokens": 1, "min_new_tokens": 2}}, "min_new_tokens"),
    ({"input_ids": [5], "sampling_params": {"n": 0}}, "n must be"),
    ({"input_ids": [5], "sampling_params": {"n": 100_000}}, "4096"),
    ({"input_ids": [5], "sampling_params": {"sampling_seed": 2**63}}, "sampling_seed"),
    ({"input_ids": [5], "sampling_params": {"stop_token_ids": [9999]}}, "9999"),
    ({"input_ids": [5], "sampling_params": {"stop": [""]}}, "stop"),
    ({"input_ids": [5], "sampling_params": {"frequency_penalty": 0.5}}, "frequency_penalty"),
    ({"input_ids": [5], "sampling_params": {"repetition_penalty": 1.1}}, "repetition_penalty"),
    ({"input_ids": [5], "sampling_params": {"logit_bias": {"5": 1.0}}}, "logit_bias"),
    ({"input_ids": [5], "sampling_params": {"json_schema": "{}"}}, "json_schema"),
    ({"input_ids": [5], "sampling_params": {"regex": "a*"}}, "regex"),
    ({"input_ids": [5], "sampling_params": {"temprature": 1}}, "temprature"),
    ({"input_ids": [5], "sampling_params": [3]}, "sampling_params"),
    ({"input_ids": [5], "top_logprobs_num": 3}, "top_logprobs_num"),
    ({"input_ids": [5], "lora_path": "x"}, "lora_path"),
    ({"input_ids": [5], "return_logprobs": True}, "return_logprobs"),
    ({"input_ids": [5], "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
    ({"input_ids": [5], "return_routed_experts": True, "routed_experts_start_len": 2}, "routed_experts_start_len"),
    ({"input_ids": [5], "rid": 3}, "rid"),
    ({"input_ids": [5], "stream": "yes"}, "stream"),
    ([5], "JSON object"),
]


@pytest.mark.parametrize(("body", "words"), REFUSED, ids=lambda x: str(x)[:60])
def test_a_request_that_cannot_be_served_is_a_400_with_a_message(server, body, words):
    answer = server.post("/generate", body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_neutral_values_of_unsupported_fields_are_taken(server):
    params = {
        **SHORT,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "regex": None,
        "stop": [],
    }
    body = {"input_ids": [5], "sampling_params": params, "top_logprobs_num": 0, "lora_path": None, "priority": 4}
    assert len(server.generate(**body)["output_ids"]) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 50_000])
def test_a_body_that_is_not_json(server, content):
    answer = server.ask(lambda client: client.post("/generate", content=content))
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]


def test_a_body_that_is_too_large(server):
    body = {"input_ids": [100] * 40_000}
    assert server.post("/generate", body).status_code == 413

    async def chunks():
        for _ in range(200):
            yield b" " * 1000

    assert server.ask(lambda client: client.post("/generate", content=chunks())).status_code == 413


def test_unknown_paths_and_methods(server):
    assert server.post("/nope").status_code == 404
    assert server.post("/generate", method="DELETE").status_code == 405


def test_a_request_larger_than_the_cache_is_refused(model_dir):
    with serving(model_dir, max_total_tokens=128) as small:
        answer = small.post("/generate", {"input_ids": [5] * 100, "sampling_params": {"max_new_tokens": 50}})
        assert answer.status_code == 400
        assert "KV cache of 128 tokens" in answer.json()["error"]["message"]
        full = {"max_new_tokens": 28, "temperature": 0, "ignore_eos": True}
        assert len(small.generate(input_ids=[5] * 100, sampling_params=full)["output_ids"]) == 28


def test_a_cache_is_filled_to_its_last_whole_block(model_dir):
    """Positions are allocated 64 at a time: of 1000, 960 can be used."""
    with serving(model_dir, max_total_tokens=1000) as small:
        params = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
        answer = small.post("/generate", {"input_ids": [5] * 970, "sampling_params": params})
        assert answer.status_code == 400
        assert "KV cache of 960 tokens" in answer.json()["error"]["message"]
        assert len(small.generate(input_ids=[5] * 940, sampling_params=params)["output_ids"]) == 20
        whole = {"input_ids": [5] * 960, "sampling_params": {"max_new_tokens": 0}}
        assert small.generate(**whole)["output_ids"] == []
        assert small.post("/server_info", method="GET").json()["max_total_num_tokens"] == 960


def test_a_huge_top_k_takes_all(server):
    params = {"max_new_tokens": 9, "sampling_seed": 1, "top_p": 0.9, "ignore_eos": True}
    want = server.generate(input_ids=[5], sampling_params=params)["output_ids"]
    assert server.generate(input_ids=[5], sampling_params=params | {"top_k": 2**63})["output_ids"] == want


def test_ids_of_requests(server):
    assert server.generate(input_ids=[5], sampling_params=SHORT, rid="a")["meta_info"]["id"] == "a"
    many = server.generate(input_ids=[[5], [6]], sampling_params=SHORT, rid="b")
    assert [a["meta_info"]["id"] for a in many] == ["b_0", "b_1"]
    named = server.generate(input_ids=[[5], [6]], sampling_params=SHORT, rid=["x", "y"])
    assert [a["meta_info"]["id"] for a in named] == ["x", "y"]
    assert isinstance(server.generate(input_ids=[[5]], sampling_params=SHORT), list)


def test_meta_info_has_what_sglang_fills_in(server):
    meta = server.generate(input_ids=[5, 6], sampling_params=SHORT, return_logprob=True)["meta_info"]
    assert {k: meta[k] for k in ("finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens")} == {
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "cached_tokens": 0,
    }
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]
    assert meta["num_retractions"] == 0
    assert meta["output_token_logprobs_length"] == 3


def test_stream_is_cumulative(server):
    body = {"input_ids": [5, 6], "sampling_params": {**SHORT, "max_new_tokens": 8}, "return_logprob": True}
    whole = server.generate(**body)
    answer = server.post("/generate", body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    for event in events:
        count = len(event["output_ids"])
        assert event["output_ids"] == whole["output_ids"][:count]
        assert len(event["meta_info"]["output_token_logprobs"]) == count
    assert [e["meta_info"]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    last = events[-1]
    assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 8}


def test_stream_of_many_names_each_sequence(server):
    body = {"input_ids": [[5], [6]], "sampling_params": [SHORT, {**SHORT, "max_new_tokens": 6}], "stream": True}
    lines = server.post("/generate", body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    last = {e["index"]: len(e["output_ids"]) for e in events}
    assert last == {0: 3, 1: 6}


def generating(client, **body):
    return asyncio.create_task(client.post("/generate", json={"input_ids": [5, 6, 7], "sampling_params": LONG, **body}))


def test_abort_answers_with_the_partial_tokens(server):
    async def run(client):
        one, other = generating(client, rid="job-1", return_logprob=True), generating(client, rid="other")
        await server.started()
        assert (await client.post("/abort_request", json={"rid": "job"})).status_code == 200
        aborted = await one
        assert server.engine.num_running() == 1
        await client.post("/abort_request", json={"abort_all": True})
        return aborted, await other

    for answer in server.ask(run):
        assert answer.status_code == 200
        meta = answer.json()["meta_info"]
        assert meta["finish_reason"] == {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        assert 3 <= meta["completion_tokens"] == len(answer.json()["output_ids"]) < 1500


def uninterrupted(server, count):
    return server.generate(input_ids=[5, 6, 7], sampling_params={**LONG, "max_new_tokens": count})["output_ids"]


@pytest.mark.parametrize(("mode", "retractions"), [("in_place", 0), ("retract", 1)])
def test_pause_and_continue(server, mode, retractions):
    async def run(client):
        task = generating(client, sampling_params={**LONG, "max_new_tokens": 300})
        await server.started()
        paused = await client.post("/pause_generation", json={"mode": mode})
        assert paused.json() == {"message": "Generation paused successfully.", "status": "ok"}
        late = generating(client, sampling_params=SHORT)
        flushed = await client.post("/flush_cache")
        await asyncio.sleep(0.2)
        assert not task.done()
        assert not late.done()
        await client.post("/continue_generation", json={})
        return flushed.status_code, (await task).json(), (await late).json()

    flushed, answer, late = server.ask(run)
    assert flushed == (400 if mode == "in_place" else 200)
    assert answer["meta_info"]["num_retractions"] == retractions
    assert answer["output_ids"] == uninterrupted(server, 300)
    assert late["output_ids"] == uninterrupted(server, 3)


def test_pause_abort_and_abort_while_waiting(server):
    async def run(client):
        task = generating(client)
        await server.started()
        await client.post("/pause_generation", json={})
        first = (await task).json()
        waiting = generating(client, rid="waiting")
        await server.until(lambda: server.engine.num_unfinished() == 1)
        await client.post("/abort_request", json={"rid": "waiting"})
        second = (await waiting).json()
        await client.post("/continue_generation", json={})
        return first, second

    first, second = server.ask(run)
    assert first["meta_info"]["finish_reason"]["type"] == "abort"
    assert first["output_ids"] == uninterrupted(server, len(first["output_ids"]))
    assert second["meta_info"]["finish_reason"]["type"] == "abort"
    assert second["output_ids"] == []


def test_flush_waits_when_told_to(server):
    async def run(client):
        task = generating(client, sampling_params={**LONG, "max_new_tokens": 150})
        await server.started()
        assert (await client.post("/flush_cache")).status_code == 400
        patient = await client.post("/flush_cache?timeout=30")
        await task
        return patient, await client.get("/flush_cache?timeout=soon")

    patient, wrong = server.ask(run)
    assert patient.status_code == 200
    assert wrong.status_code == 400


def test_wrong_pause_mode(server):
    answer = server.post("/pause_generation", {"mode": "sleep"})
    assert answer.status_code == 400
    assert "'sleep'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/abort_request", {"abort_all_request": True}, "abort_all_request"),
        ("/pause_generation", {"modes": "retract"}, "modes"),
        ("/continue_generation", {"mode": "retract"}, "mode"),
        ("/update_weights_from_disk", {"model_path": "x", "keep_pause": True}, "keep_pause"),
        ("/update_weights_from_disk", {"model_path": "x", "version": "1"}, "version"),
        ("/begin_weight_update", {"selector": "draft"}, "selector"),
        ("/end_weight_update", {"abort": 1}, "abort"),
        ("/update_weights_from_distributed", {"selector": "draft"}, "selector"),
        ("/init_weights_update_group", {"address": "x"}, "address"),
        ("/destroy_weights_update_group", {"group": "g"}, "group"),
        ("/update_weight_version", {"new_version": "1", "abort_all": False}, "abort_all"),
        ("/weights_checker", {"skip_tensor_list": ["lm_head"]}, "skip_tensor_list"),
        ("/get_weights_by_name", {"name": "model.norm.weight", "size": 3}, "size"),
    ],
)
def test_control_calls_refuse_fields_by_name(server, path, body, named):
    answer = server.post(path, body)
    assert answer.status_code == 400
    said = answer.json()
    said = said.get("message") or said["error"]["message"]
    assert said in (f"unknown field {named}", f"{named}={body[named]!r} is not supported by the embedded server")


def test_control_calls_take_sglangs_fields_that_change_nothing(server, model_dir):
    everywhere = {"rid": None, "http_worker_ipc": None}
    cache = {"flush_cache": True, "torch_empty_cache": True}
    disk = {"model_path": str(model_dir), "load_format": "auto", "recapture_cuda_graph": True, "token_step": 3}
    for path, body in [
        ("/update_weights_from_disk", disk | cache | {"is_async": False, "keep_pause": False, "manifest": None}),
        ("/update_weights_from_disk", {"model_path": str(model_dir), "load_format": None}),
        ("/begin_weight_update", {"selector": "all"}),
        ("/end_weight_update", {}),
        ("/pause_generation", {"mode": "in_place"}),
        ("/continue_generation", {"torch_empty_cache": False}),
        ("/weights_checker", {"action": "checksum", "allow_quant_error": False, "selector": "all"}),
        ("/abort_request", {"rid": "nobody", "abort_all": False, "abort_message": None}),
    ]:
        assert server.post(path, everywhere | body).status_code == 200, path


def test_info_health_and_loads(server, model_dir):
    for path in ("/model_info", "/get_model_info"):
        info = server.post(path, method="GET").json()
        assert info["model_path"] == str(model_dir)
        assert info["weight_version"] == "default"
        assert info["is_generation"] is True
    for path in ("/server_info", "/get_server_info"):
        info = server.post(path, method="GET").json()
        assert info["context_length"] == 2048
        assert info["max_total_num_tokens"] == 4096
        assert info["internal_states"][0]["num_running_reqs"] == 0
    assert server.post("/v1/loads", method="GET").json()["loads"][0]["paused"] is False
    for path in ("/health", "/health_generate"):
        assert server.post(path, method="GET").status_code == 200


def test_health_while_busy_and_while_paused(server):
    async def run(client):
        task = generating(client, rid="busy")
        await server.started()
        busy = (await client.get("/health")).status_code
        await client.post("/pause_generation", json={"mode": "in_place"})
        paused = (await client.get("/health_generate")).status_code
        await client.post("/continue_generation", json={})
        await client.post("/abort_request", json={"rid": "busy"})
        await task
        return busy, paused

    assert server.ask(run) == (200, 200)


@pytest.mark.parametrize(
    ("keys", "given", "generate", "control"),
    [
        ({}, None, 200, 200),
        ({"api_key": "k"}, None, 401, 401),
        ({"api_key": "k"}, "k", 200, 200),
        ({"api_key": "k"}, "kk", 401, 401),
        ({"api_key": "k", "admin_api_key": "a"}, "k", 200, 401),
        ({"api_key": "k", "admin_api_key": "a"}, "a", 401, 200),
        ({"admin_api_key": "a"}, None, 200, 401),
    ],
)
def test_keys(model_dir, keys, given, generate, control):
    headers = {} if given is None else {"authorization": f"Bearer {given}"}
    with serving(model_dir, **keys) as s:
        body = {"input_ids": [5], "sampling_params": SHORT}
        assert s.post("/generate", body, **headers).status_code == generate
        assert s.post("/model_info", method="GET", **headers).status_code == generate
        assert s.post("/flush_cache", **headers).status_code == control
        assert s.post("/health", method="GET").status_code == 200
        if given is not None:
            assert s.post("/generate", body, authorization=given).status_code == 401


def test_every_endpoint_that_changes_state_needs_the_admin_key(model_dir):
    with serving(model_dir, admin_api_key="a") as s:
        posts = {r.path for r in s.routes if "POST" in (r.methods or ())} - {"/generate"}
        assert posts == CONTROL_PATHS
        assert {path: s.post(path).status_code for path in posts} == dict.fromkeys(posts, 401)


def test_a_crash_of_the_engine_surfaces_everywhere(model_dir):
    with serving(model_dir) as s:

        async def run(client):
            running, streaming = generating(client), generating(client, stream=True)
            await s.started()

            def explode(version):
                raise RuntimeError("boom")

            s.engine.batch.step = explode
            answers = [await running, await streaming, await generating(client)]
            return answers, await client.get("/health"), await client.post("/flush_cache")

        (running, streaming, later), health, control = s.ask(run)
    for answer in (running, later, control):
        assert answer.status_code == 500
        assert "RuntimeError: boom" in answer.json()["error"]["message"]
    assert "RuntimeError: boom" in streaming.text
    assert health.status_code == 503
    assert s.engine.crashed


def test_weights_that_are_not_numbers_fail_the_request_only(model_dir):
    with serving(model_dir) as s:
        norm = s.loaded.model.model.norm.weight
        good = norm[0].item()
        norm[0] = float("nan")
        answer = s.post("/generate", {"input_ids": [5], "sampling_params": SHORT})
        assert answer.status_code == 500
        assert "not finite" in answer.json()["error"]["message"]
        with torch.inference_mode():
            norm[0] = good
        assert len(s.generate(input_ids=[5], sampling_params=SHORT)["output_ids"]) == 3


def test_the_cache_of_a_failed_request_spoils_no_later_one(model_dir):
    """Its cells stay behind in row 0, where a longer row beside a later short one makes attention read them."""
    later = {"input_ids": [[5], [9] * 40], "sampling_params": SHORT}
    with serving(model_dir) as s:
        want = [a["output_ids"] for a in s.generate(**later)]
        s.loaded.model.model.embed_tokens.weight[7] = float("nan")
        assert s.post("/generate", {"input_ids": [7] * 30, "sampling_params": SHORT}).status_code == 500
        assert [a["output_ids"] for a in s.generate(**later)] == want


def test_a_stream_from_a_stopped_engine_is_a_500(model_dir):
    with serving(model_dir) as s:
        s.engine.stop()
        answer = s.post("/generate", {"input_ids": [5], "sampling_params": SHORT, "stream": True})
    assert answer.status_code == 500
    assert "shutting down" in answer.json()["error"]["message"]


def test_a_stream_that_nobody_reads_is_aborted(server):
    """Sending fails before the first event is made."""

    class Gone(Exception):
        pass

    async def run(client):
        wanted = protocol.parse({"input_ids": [5], "sampling_params": LONG}, server.loaded, 4096, False)
        stream = Stream(server.engine, server.loaded, wanted)

        async def receive():
            await asyncio.sleep(60)

        async def send(message):
            raise Gone

        with pytest.raises((Gone, ExceptionGroup)):
            await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        await server.until(lambda: wanted.sequences[0].finish is not None)
        return wanted.sequences[0].finish

    assert server.ask(run)["message"] == "Client disconnected"


def test_stopping_fails_what_runs(model_dir):
    with serving(model_dir) as s:

        async def run(client):
            task = generating(client)
            await s.started()
            await asyncio.to_thread(s.engine.stop)
            return await task

        answer = s.ask(run)
    assert answer.status_code == 500
    assert "shutting down" in answer.json()["error"]["message"]
    assert not s.engine.crashed
