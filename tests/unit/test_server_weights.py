"""The embedded server's weights: file names, checksum, updates from disk and by broadcast, and updates that fail."""

import asyncio
import json
import multiprocessing
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megasapo.hf_files import HFFiles
from megasapo.rollout.local.weights import Weights, _view, served_specs
from megasapo.rollout.weight_group import WeightGroup, host_store
from tests.serving import TIMEOUT_S, file_checksum, serving
from tests.tiny import make_model, weights_checksum

SHORT = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
ASK = {"input_ids": [5, 6, 7], "sampling_params": SHORT}


@pytest.fixture
def server(dirs):
    with serving(dirs[0], weight_version="0") as s:
        yield s


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("moe", {}),
        ("moe", {"mlp_only_layers": [1], "num_experts": 3}),
        ("dense", {}),
        ("dense", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen2_moe", {}),
        ("mixtral", {}),
        ("glm4_moe", {}),
        ("deepseek_v3", {}),
        ("gpt_oss", {}),
    ],
)
def test_weights_have_the_files_names_and_bits(tmp_path, kind, over):
    directory = make_model(tmp_path, kind=kind, **over)
    weights = Weights(AutoModelForCausalLM.from_pretrained(directory))
    file = load_file(directory / "model.safetensors")
    assert sorted(weights.names) == sorted(file)
    assert all(torch.equal(weights.get(name), tensor) for name, tensor in file.items())
    assert weights.checksum() == weights_checksum(file)


def test_a_view_of_a_huge_parameter_costs_what_the_view_has():
    """A parameter of 2**40 elements, of which one name is two rows of three, a row apart."""
    parameter = torch.empty(1 << 20, 1 << 20, device="meta")
    numbers = (1 << 21) + 4 + torch.tensor([[0, 1, 2], [1 << 20, (1 << 20) + 1, (1 << 20) + 2]])
    view = _view(parameter, numbers, "x")
    assert (view.shape, view.stride(), view.storage_offset()) == ((2, 3), (1 << 20, 1), (1 << 21) + 4)
    for wrong in (numbers.flip(0), numbers + torch.tensor([0, 0, 1]), numbers + (1 << 40)):
        with pytest.raises(NotImplementedError, match="x: transformers does not hold"):
            _view(parameter, wrong, "x")


def test_update_from_disk_is_the_other_model(server, dirs):
    assert server.checksum() == file_checksum(dirs[0])
    before = server.generate(**ASK)["output_ids"]
    answer = server.post("/update_weights_from_disk", {"model_path": str(dirs[1]), "weight_version": "7"})
    assert answer.status_code == 200
    assert answer.json()["success"] is True
    assert server.checksum() == file_checksum(dirs[1])
    after = server.generate(**ASK)
    with serving(dirs[1]) as fresh:
        assert after["output_ids"] == fresh.generate(**ASK)["output_ids"] != before
    assert after["meta_info"]["weight_version"] == "7"
    info = server.post("/model_info", method="GET").json()
    assert (info["weight_version"], info["model_path"]) == ("7", str(dirs[1]))


def test_update_from_shards(server, dirs, tmp_path):
    file = load_file(dirs[1] / "model.safetensors")
    names = sorted(file)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in parts.items():
        save_file({n: file[n] for n in part}, tmp_path / shard)
    index = {"weight_map": {n: shard for shard, part in parts.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert server.post("/update_weights_from_disk", {"model_path": str(tmp_path)}).status_code == 200
    assert server.checksum() == file_checksum(dirs[1])


def rewritten(change):
    """A function that copies a model directory and changes its tensors."""

    def spoil(source, target):
        file = load_file(source / "model.safetensors")
        change(file)
        save_file(file, target / "model.safetensors")

    return spoil


def truncated(source, target):
    data = (source / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(data[: len(data) // 2])


def missing_shard(source, target):
    shutil.copy(source / "model.safetensors", target / "a.safetensors")
    there = dict.fromkeys(load_file(source / "model.safetensors"), "a.safetensors")
    index = {"weight_map": there | {"y": "b.safetensors"}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda source, target: None, "no such weights"),
        (truncated, "truncated: tensor"),
        (missing_shard, "b.safetensors"),
        (lambda source, target: (target / "model.safetensors.index.json").write_text("{}"), "index"),
        (rewritten(lambda file: file.pop("model.norm.weight")), "lacks 1 weights, the first is 'model.norm.weight'"),
        (rewritten(lambda file: file.update({"model.norn.weight": torch.ones(1)})), "nearest: model.norm.weight"),
        (rewritten(lambda file: file.update({"lm_head.weight": torch.ones(3, 64)})), "[3, 64]"),
    ],
)
def test_a_failed_update_leaves_the_old_weights(server, dirs, tmp_path, spoil, words):
    before = server.generate(**ASK)["output_ids"]
    spoil(dirs[1], tmp_path)
    answer = server.post("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "9"})
    assert answer.status_code == 400
    assert answer.json()["success"] is False
    assert words in answer.json()["message"]
    assert server.checksum() == file_checksum(dirs[0])
    again = server.generate(**ASK)
    assert again["output_ids"] == before
    assert again["meta_info"]["weight_version"] == "0"


def test_overwriting_the_file_does_not_reach_the_model(tmp_path):
    directory = make_model(tmp_path)
    with serving(directory) as server:
        before = server.checksum()
        with (directory / "model.safetensors").open("r+b") as f:
            f.seek(-200_000, 2)
            f.write(b"\x01" * 200_000)
        assert server.checksum() == before


def test_an_update_waits_for_what_runs_and_holds_back_what_comes(server, dirs):
    async def run(client):
        long = ASK | {"sampling_params": {**SHORT, "max_new_tokens": 80}}
        body = {"model_path": str(dirs[1]), "weight_version": "1"}
        with server.holding():
            first = asyncio.create_task(client.post("/generate", json=long))
            await server.started()
            update = asyncio.create_task(client.post("/update_weights_from_disk", json=body))
            await server.until(lambda: len(server.engine._inbox) == 1)
        late = await client.post("/generate", json=ASK)
        return (await first).json(), (await update).status_code, late.json()

    first, status, late = server.ask(run)
    assert status == 200
    assert first["meta_info"]["weight_versions"] == [{"version": "0", "start": 0, "end": 80}]
    assert late["meta_info"]["weight_versions"] == [{"version": "1", "start": 0, "end": 6}]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_an_update_while_paused_is_at_once_and_in_the_spans(server, dirs, mode):
    async def run(client):
        params = {**SHORT, "max_new_tokens": 60}
        with server.holding():
            task = asyncio.create_task(client.post("/generate", json={"input_ids": [5, 6], "sampling_params": params}))
            await server.started()
            await client.post("/pause_generation", json={"mode": mode})
        waiting = asyncio.create_task(client.post("/generate", json=ASK))
        await server.until(lambda: server.engine.num_unfinished() == 2)
        body = {"model_path": str(dirs[1]), "weight_version": "1"}
        assert (await client.post("/update_weights_from_disk", json=body)).status_code == 200
        assert not waiting.done()
        await client.post("/continue_generation", json={})
        return (await task).json(), (await waiting).json()

    answer, waited = server.ask(run)
    spans = answer["meta_info"]["weight_versions"]
    assert [s["version"] for s in spans] == ["0", "1"]
    assert spans[0]["start"] == 0
    assert 3 <= spans[0]["end"] == spans[1]["start"] < spans[1]["end"] == 60
    assert answer["meta_info"]["weight_version"] == "1"
    assert answer["meta_info"]["num_retractions"] == (1 if mode == "retract" else 0)
    assert waited["meta_info"]["weight_version"] == "1"


def test_abort_all_before_an_update(server, dirs):
    async def run(client):
        params = {**SHORT, "max_new_tokens": 1500}
        body = {"model_path": str(dirs[1]), "abort_all_requests": True}
        with server.holding():
            task = asyncio.create_task(client.post("/generate", json=ASK | {"sampling_params": params}))
            await server.started()
            assert (await client.post("/update_weights_from_disk", json=body)).status_code == 200
            return (await task).json()

    assert server.ask(run)["meta_info"]["finish_reason"]["type"] == "abort"


def test_weight_by_name(server, dirs):
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    got = server.post("/get_weights_by_name", {"name": name, "truncate_size": 2}).json()
    assert got == load_file(dirs[0] / "model.safetensors")[name][:2].tolist()
    answer = server.post("/get_weights_by_name", {"name": "model.norm.wait"})
    assert answer.status_code == 400
    assert "model.norm.weight" in answer.json()["error"]["message"]


def test_sessions_and_versions(server):
    update = {"names": [], "dtypes": [], "shapes": []}
    outside = server.post("/update_weights_from_distributed", update)
    assert outside.status_code == 400
    assert "must run between begin_weight_update() and end_weight_update()" in outside.json()["message"]
    assert server.post("/end_weight_update").status_code == 400
    assert server.post("/begin_weight_update").status_code == 200
    assert server.post("/begin_weight_update").status_code == 400
    no_group = server.post("/update_weights_from_distributed", update)
    assert "init_weights_update_group" in no_group.json()["message"]
    assert server.post("/end_weight_update").status_code == 200
    assert server.post("/destroy_weights_update_group", {"group_name": "g"}).status_code == 400
    assert server.post("/update_weight_version", {}).status_code == 400
    assert server.post("/update_weight_version", {"new_version": "3"}).json()["new_version"] == "3"
    assert server.generate(**ASK)["meta_info"]["weight_version"] == "3"


def send(connection, directory, calls):
    """Rank 0, in a process of its own as in life: broadcasts `calls`, each a list of names, each or flattened."""
    file = load_file(directory / "model.safetensors")
    store = host_store("127.0.0.1", 2, TIMEOUT_S)
    connection.send(store.port)
    group = WeightGroup.join("127.0.0.1", store.port, 0, 2, "g", "gloo", TIMEOUT_S, store=store)
    for names, flat in calls:
        tensors = [converted(name, file.get(name, torch.ones(3))) for name in names]
        if flat:
            tensors = [torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])]
        for tensor in tensors:
            group.broadcast(tensor)
    connection.recv()  # the other side is done
    group.close()


def converted(name, tensor):
    """Three bfloat16 numbers go first, so that what follows in a bucket is not aligned to four bytes."""
    return tensor[:3].to(torch.bfloat16) if name == "model.nonsense" else tensor


def test_update_by_broadcast(server, dirs):
    """All weights of the other model, one by one and as buckets; one call that must fail and keep the group in step."""
    file = load_file(dirs[1] / "model.safetensors")
    names = sorted(file)
    calls = [(names[:40], False), (["model.nonsense", *names[40:50]], True), (names[40:90], True), (names[90:], False)]
    here, there = multiprocessing.get_context("spawn").Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=send, args=(there, dirs[1], calls), daemon=True)
    sender.start()

    async def run(client):
        assert await asyncio.to_thread(here.poll, TIMEOUT_S), "the sender did not start"
        body = {"master_address": "127.0.0.1", "master_port": here.recv(), "rank_offset": 1, "world_size": 2}
        answers = [
            await client.post("/init_weights_update_group", json=body | {"group_name": "g", "backend": "gloo"}),
            await client.post("/begin_weight_update", json={}),
        ]
        for part, flat in calls:
            tensors = [converted(n, file.get(n, torch.ones(3))) for n in part]
            body = {
                "names": part,
                "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors],
                "shapes": [list(t.shape) for t in tensors],
                "group_name": "g",
                "load_format": "flattened_bucket" if flat else None,
                "weight_version": str(len(part)),
            }
            answers.append(await client.post("/update_weights_from_distributed", json=body))
        answers.append(await client.post("/end_weight_update", json={}))
        answers.append(await client.post("/destroy_weights_update_group", json={"group_name": "g"}))
        return answers

    try:
        answers = server.ask(run)
        here.send("done")
        sender.join(TIMEOUT_S)
    finally:
        sender.kill()
    assert [a.status_code for a in answers] == [200, 200, 200, 400, 200, 200, 200, 200]
    assert "model.nonsense" in answers[3].json()["message"]
    assert server.checksum() == file_checksum(dirs[1])
    assert server.generate(**ASK)["meta_info"]["weight_version"] == str(len(names) - 90)
    assert sender.exitcode == 0


def test_a_group_that_nobody_leads_is_an_error_and_the_server_lives(server, monkeypatch):
    monkeypatch.setattr("megasapo.rollout.local.control.JOIN_TIMEOUT_S", 1.0)
    body = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    answer = server.post("/init_weights_update_group", body)
    assert answer.status_code == 400
    assert answer.json()["success"] is False
    assert len(server.generate(**ASK)["output_ids"]) == 6


def test_layers_after_the_models_last_are_not_its_weights(tmp_path):
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(2, 2) for i in range(12)}
    save_file(tensors | {"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    found = served_specs(HFFiles(tmp_path), num_layers=10)
    assert set(found) == {"lm_head.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(10))}
