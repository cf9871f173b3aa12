"""The embedded server while it generates: streams, pausing, aborting, control calls, and how it breaks."""

import asyncio
import json
import threading
import time

import pytest
import torch

from megasapo.rollout.local import protocol
from megasapo.rollout.local.engine import EngineError
from megasapo.rollout.local.stream import Stream
from tests.serving import TIMEOUT_S, serving

LONG = {"max_new_tokens": 1500, "temperature": 0, "ignore_eos": True}
SHORT = {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(model_dir):
    with serving(model_dir, max_total_tokens=4096) as s:
        yield s


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
        with server.holding():
            one, other = generating(client, rid="job-1", return_logprob=True), generating(client, rid="other")
            await server.started(2)
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
        with server.holding():
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
        with server.holding():
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
        with server.holding():
            task = generating(client, sampling_params={**LONG, "max_new_tokens": 150})
            await server.started()
            assert (await client.post("/flush_cache")).status_code == 400
        patient = await client.post(f"/flush_cache?timeout={TIMEOUT_S}")
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


def test_health_while_busy_and_while_paused(server):
    async def run(client):
        with server.holding():
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


def test_health_of_an_idle_engine_that_is_paused_before_it_can_generate(model_dir, monkeypatch):
    """As when weights are published just then: the server is well, though no token comes before it is continued."""
    with serving(model_dir) as s:
        submit = s.engine.submit

        def paused_first(job):
            s.engine.control(lambda: s.engine.pause("in_place")).result()
            submit(job)

        monkeypatch.setattr(s.engine, "submit", paused_first)
        assert s.post("/health", method="GET").status_code == 200


@pytest.mark.parametrize("limit_s", [0.2, 2 * TIMEOUT_S])
def test_health_of_an_engine_in_a_step_that_takes_long(model_dir, limit_s):
    with serving(model_dir, health_timeout_s=limit_s) as s:
        entered, go_on = threading.Event(), threading.Event()
        s.engine.control(lambda: (entered.set(), go_on.wait(TIMEOUT_S)))
        assert entered.wait(TIMEOUT_S)

        async def run(client):
            asked = asyncio.create_task(client.get("/health_generate"))
            if limit_s > 1:
                await asyncio.sleep(0.5)
                assert not asked.done()
                go_on.set()
            return await asked

        answer = s.ask(run)
        go_on.set()
    if limit_s > 1:
        assert answer.status_code == 200
    else:
        assert (answer.status_code, answer.text) == (503, "the engine does not answer in --health-timeout-s=0.2")


def test_a_crash_of_the_engine_surfaces_everywhere(model_dir):
    with serving(model_dir) as s:

        async def run(client):
            def explode(version):
                raise RuntimeError("boom")

            with s.holding():
                running, streaming = generating(client), generating(client, stream=True)
                await s.started(2)
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


def test_a_control_call_that_nobody_waits_for_any_more_does_not_disturb_the_end(model_dir):
    """A health check gives up on an engine in a long step; its call is still queued when the engine stops."""
    with serving(model_dir) as s:
        entered, go_on = threading.Event(), threading.Event()
        s.engine.control(lambda: (entered.set(), go_on.wait(TIMEOUT_S)))
        assert entered.wait(TIMEOUT_S)
        given_up, waited_for = (s.engine.control(lambda: None) for _ in range(2))
        assert given_up.cancel()
        stopping = threading.Thread(target=s.engine.stop)
        stopping.start()
        while not s.engine._stopping:
            time.sleep(0.001)
        go_on.set()
        stopping.join()
        with pytest.raises(EngineError, match="shutting down"):
            waited_for.result(timeout=TIMEOUT_S)
        assert not s.engine.crashed


def test_stopping_fails_what_runs(model_dir):
    with serving(model_dir) as s:

        async def run(client):
            with s.holding():
                task = generating(client)
                await s.started()
                await asyncio.to_thread(s.engine.stop)
            return await task

        answer = s.ask(run)
    assert answer.status_code == 500
    assert "shutting down" in answer.json()["error"]["message"]
    assert not s.engine.crashed
