"""The embedded server over HTTP: what it refuses, ids, limits, keys, and what it says of itself."""

import pytest

from tests.serving import serving

SHORT = {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}


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
    ({"input_ids": [5], "sampling_params": {"max_new_tokens": None}}, "max_new_tokens=None"),
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


HALF_A_PAIR = "\\ud83d"  # of an emoji: JSON can say it, UTF-8 cannot


@pytest.mark.parametrize(
    "body",
    [
        f'{{"text": "{HALF_A_PAIR}"}}',
        f'{{"input_ids": [5], "rid": "{HALF_A_PAIR}"}}',
        f'{{"input_ids": [5], "{HALF_A_PAIR}": 1}}',
        f'{{"input_ids": [5], "sampling_params": {{"stop": "{HALF_A_PAIR}"}}}}',  # read on the engine's thread
        b'{"text": "\xed\xa0\xbd"}',
    ],
)
def test_text_that_cannot_be_encoded_is_refused_and_harms_nobody(server, body):
    answer = server.ask(lambda client: client.post("/generate", content=body))
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]
    whole = server.generate(text="\U0001f600", sampling_params=SHORT | {"stop": "\U0001f600"}, rid="\U0001f600")
    assert whole["meta_info"]["id"] == "\U0001f600"
    assert server.engine.failure is None


@pytest.mark.parametrize("path", ["/generate", "/pause_generation"])
def test_a_client_that_leaves_before_its_body_has_come(server, path):
    async def run(client):
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        sent = []

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await server.asgi(scope, receive, send)
        return sent[0]["status"]

    assert server.ask(run) == 400


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
        assert posts == s.asgi.control_paths
        assert {path: s.post(path).status_code for path in posts} == dict.fromkeys(posts, 401)
