"""Weights reach real embedded servers bit for bit, in each way of publishing, also after a server was killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megasapo.publish import Bucket, Publisher
from megasapo.rollout.broadcast import Broadcast
from megasapo.rollout.client import ServerClient
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.local import payload
from megasapo.rollout.online import OnlineDelivery
from megasapo.rollout.protocol import INCOMPLETE, RolloutError
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams
from tests.tiny import make_model

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [(5, 6, 7), (300, 41)]
TIMEOUT_S = 300.0  # of what hangs
ONLINE = pytest.mark.parametrize("method", ["distributed", "tensor"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape: what the servers start with and what the learner has."""
    root = tmp_path_factory.mktemp("models")
    return make_model(root / "old", seed=1), make_model(root / "new", seed=2)


@pytest.fixture(scope="module")
def fleet(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    cfg = RolloutConfig(server_args=("--threads", "1"), start_timeout_s=TIMEOUT_S, max_restarts=10)
    with Fleet.start(cfg, models[0], tmp_path_factory.mktemp("run")) as fleet:
        yield fleet


def older() -> RolloutConfig:
    """A server without update sessions."""
    script = str(Path(__file__).with_name("older_server.py"))
    command = (sys.executable, script, "--model", "{model}", "--port", "{port}")
    return RolloutConfig(engine="sglang", spawn_command=command, start_timeout_s=TIMEOUT_S, deterministic=False)


def export_of(directory: Path, per_bucket: int = 20) -> Iterator[Bucket]:
    tensors = list(load_file(directory / "model.safetensors").items())
    for i in range(0, len(tensors), per_bucket):
        yield tensors[i : i + per_bucket]


def publisher(
    fleet: Fleet, source: Path, models: tuple[Path, Path], run_dir: Path, method: Any, **over: Any
) -> Publisher:
    return Publisher(
        over.pop("export", lambda: export_of(source)),
        fleet,
        RolloutConfig(publish=method, start_timeout_s=TIMEOUT_S, publish_changed_only=over.pop("changed_only", False)),
        rank=0,
        agree=lambda x: x,
        run_dir=run_dir,
        model_dir=models[0],
        verify=over.pop("verify", True),
    )


def generate(fleet: Fleet) -> list[Completion]:
    async def run() -> list[Completion]:
        try:
            return await fleet.generate(PROMPTS, [GREEDY] * len(PROMPTS))
        finally:
            await fleet.close()

    return asyncio.run(run())


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [c.output_ids for c in completions]


def greedy_by_transformers(directory: Path) -> list[tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        ids = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
        out.append(tuple(ids[0, len(prompt) :].tolist()))
    return out


def memory_in_use() -> set[Path]:
    """What this process shares by name; of what it sent to a server by torch's own pickler some stays until it ends."""
    return set(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


@pytest.mark.parametrize("method", ["disk", "distributed", "tensor"])
def test_servers_have_the_learners_weights_after_a_publish(
    fleet: Fleet, models: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    """`verify` compares the server's hash with the export's; the greedy tokens are those of transformers."""
    before = memory_in_use()
    expected = {m: greedy_by_transformers(m) for m in models}
    assert expected[models[0]] != expected[models[1]]
    for version, source in ((1, models[1]), (2, models[0]), (3, models[1])):
        p = publisher(fleet, source, models, tmp_path, method)
        p(version)
        completions = generate(fleet)
        assert tokens(completions) == expected[source]
        assert {(c.version_min, c.version_max) for c in completions} == {(version, version)}
        assert not fleet.stale()
        p.close()
    assert memory_in_use() <= before
    if method == "disk":
        assert [d.name for d in (tmp_path / "weights").iterdir()] == ["v3"]
        written = tmp_path / "weights" / "v3"
        assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= {f.name for f in written.iterdir()}


@pytest.mark.parametrize(
    ("method", "update"),
    [
        ("disk", ["/update_weights_from_disk"]),
        ("distributed", ["/begin_weight_update", "/update_weights_from_distributed", "/end_weight_update"]),
        ("tensor", ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"]),
    ],
)
def test_every_way_updates_a_server_in_one_order(
    fleet: Fleet,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    update: list[str],
) -> None:
    calls: list[str] = []
    real = ServerClient._call

    async def call(self: ServerClient, verb: str, path: str, *args: Any, **kwargs: Any) -> bytes:
        if verb == "POST" and "group" not in path:
            calls.append(path)
        return await real(self, verb, path, *args, **kwargs)

    monkeypatch.setattr(ServerClient, "_call", call)
    p = publisher(fleet, models[1], models, tmp_path, method, verify=False)
    p(4)
    p.close()
    order = [path for path, _ in groupby(calls)]  # a bucket is a call
    after = ["/flush_cache", "/update_weight_version", "/continue_generation"]
    assert order == ["/pause_generation", *update, *after]


def test_each_rank_of_a_server_gets_a_payload_of_its_own(
    fleet: Fleet, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"tp_size": 2, "dp_size": 1}
    real = ServerClient.update_from_tensor

    async def server_info(self: ServerClient) -> dict[str, Any]:
        return sizes

    async def update_from_tensor(self: ServerClient, payloads: list[str]) -> None:
        first, second = payloads
        assert payload.parse(first) == payload.parse(second)
        await real(self, [second])

    monkeypatch.setattr(ServerClient, "server_info", server_info)
    monkeypatch.setattr(ServerClient, "update_from_tensor", update_from_tensor)
    p = publisher(fleet, models[0], models, tmp_path, "tensor")
    p(4)
    assert tokens(generate(fleet)) == greedy_by_transformers(models[0])
    sizes["dp_size"] = 2
    with pytest.raises(RolloutError, match=r"dp_size=2, rollout\.publish=distributed and tensor need 1"):
        p(5)


def test_a_group_serves_many_broadcasts(fleet: Fleet, models: tuple[Path, Path], tmp_path: Path) -> None:
    p = publisher(fleet, models[1], models, tmp_path, "distributed")
    for version in (4, 5, 6):
        p(version)
    delivery = p._delivery
    assert isinstance(delivery, OnlineDelivery)
    assert isinstance(delivery._channel, Broadcast)
    assert delivery._channel.groups_made == 1
    p.close()


@ONLINE
def test_servers_without_update_sessions_are_updated_too(
    models: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    """The protocol of SGLang up to 0.5.17."""
    with Fleet.start(older(), models[0], tmp_path) as fleet:
        assert not fleet.run(fleet.control(fleet.servers[0]).begin_update())
        p = publisher(fleet, models[1], models, tmp_path, method)
        p(1)
        p.close()
        completions = generate(fleet)
        assert tokens(completions) == greedy_by_transformers(models[1])
        assert {c.version_min for c in completions} == {1}


def test_a_server_that_is_restarted_between_two_buckets_is_sent_all_of_them(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Without sessions it takes the rest as if it had the beginning."""
    with Fleet.start(older(), models[0], tmp_path) as fleet:
        server, kills = fleet.servers[0], [signal.SIGKILL]

        def export() -> Iterator[Bucket]:
            for bucket in export_of(models[1]):
                yield bucket
                if kills:
                    process, started, delivery = server.process, server.incarnation, p._delivery
                    assert process is not None
                    assert isinstance(delivery, OnlineDelivery)
                    futures.wait(delivery._on_the_way)
                    [running] = psutil.Process(process.pid).children()  # the guard's
                    running.send_signal(kills.pop())
                    wait_until(lambda started=started: server.incarnation != started)  # type: ignore[misc]

        p = publisher(fleet, models[1], models, tmp_path, "tensor", export=export, verify=False)
        p(1)
        assert tokens(generate(fleet)) == greedy_by_transformers(models[1])
        p.close()


@ONLINE
def test_a_session_that_a_killed_learner_left_open_is_closed(
    fleet: Fleet, models: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    assert fleet.run(fleet.control(fleet.servers[0]).begin_update())
    p = publisher(fleet, models[0], models, tmp_path, method)
    p(6)
    assert {c.version_min for c in generate(fleet)} == {6}
    p.close()


def test_a_server_killed_in_the_middle_of_a_request_loses_nothing(
    fleet: Fleet, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """After a publish to disk the restarted server gets the weights by itself and the request ends as if unharmed."""
    p = publisher(fleet, models[1], models, tmp_path, "disk")
    p(7)
    undisturbed = generate(fleet)
    long = SamplingParams(max_new_tokens=700, temperature=0.0, ignore_eos=True)
    process = fleet.servers[0].process
    assert process is not None

    async def kill_midway() -> list[Completion]:
        server = fleet.control(fleet.servers[0])
        fleet.run(server.pause("in_place"))  # what it is asked now stays with it
        request = asyncio.create_task(fleet.generate([*PROMPTS, (9,)], [GREEDY, GREEDY, long]))
        while not fleet.run(server.server_info())["internal_states"][0]["num_waiting_reqs"]:
            await asyncio.sleep(0.01)
        assert not request.done()
        os.kill(process.pid, signal.SIGKILL)
        completions = await request
        await fleet.close()
        return completions

    fleet.take_metrics()
    after = asyncio.run(kill_midway())
    assert tokens(after[:2]) == tokens(undisturbed)
    assert [c.logprobs.tolist() for c in after[:2]] == [c.logprobs.tolist() for c in undisturbed]
    assert {c.version_min for c in after} == {7}
    assert fleet.take_metrics()["rollout/server_restarts"].value() == 1


@ONLINE
def test_without_a_directory_a_restarted_server_is_stale_until_the_next_publish(
    fleet: Fleet, models: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    p = publisher(fleet, models[1], models, tmp_path, method)
    p(8)
    expected = generate(fleet)
    process = fleet.servers[0].process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    wait_until(fleet.stale)
    assert not fleet.servers[0].ready  # it is up with the weights it was started with
    p(8)
    assert not fleet.stale()
    assert tokens(generate(fleet)) == tokens(expected)
    p.close()


@ONLINE
def test_a_publish_that_fails_midway_is_sent_again(
    fleet: Fleet, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sent, stamps = [], []
    real, real_stamp = OnlineDelivery.send, ServerClient.stamp

    def fail_once(self: OnlineDelivery, bucket: Bucket) -> None:
        sent.append(len(bucket))
        real(self, bucket)
        if len(sent) == 2:
            raise RolloutError("scripted")

    async def stamp(self: ServerClient, version: int | str) -> None:
        stamps.append(version)
        await real_stamp(self, version)

    monkeypatch.setattr(OnlineDelivery, "send", fail_once)
    monkeypatch.setattr(ServerClient, "stamp", stamp)
    before = memory_in_use()
    p = publisher(fleet, models[0], models, tmp_path, method)
    p(9)
    buckets = len(list(export_of(models[0])))
    assert len(sent) == 2 + buckets
    assert stamps == [INCOMPLETE, 9]
    assert memory_in_use() <= before
    assert tokens(generate(fleet)) == greedy_by_transformers(models[0])
    p.close()


@ONLINE
def test_only_changed_tensors_are_sent_and_all_of_them_to_a_server_that_was_restarted(
    fleet: Fleet, models: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    tensors = dict(tensor for bucket in export_of(models[1]) for tensor in bucket)

    def export() -> Iterator[Bucket]:
        yield list(tensors.items())

    p = publisher(fleet, models[1], models, tmp_path, method, export=export, changed_only=True)
    delivery = p._delivery
    assert isinstance(delivery, OnlineDelivery)
    p(20)
    assert delivery.tensors_left_out == 0
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.5
    p(21)
    assert delivery.tensors_left_out == len(tensors) - 1
    p(22)
    assert delivery.tensors_left_out == len(tensors)
    process = fleet.servers[0].process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    wait_until(fleet.stale)
    p(22)
    assert delivery.tensors_left_out == 0
    assert not fleet.stale()
    p.close()


@ONLINE
def test_a_server_that_fails_at_the_end_of_a_publish_is_left_out_until_the_next(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    cfg = RolloutConfig(spawn=2, server_args=("--threads", "1"), start_timeout_s=TIMEOUT_S, deterministic=False)
    with Fleet.start(cfg, models[0], tmp_path) as fleet:
        real, failing = ServerClient.end_update, [fleet.urls[1]]

        async def end_update(self: ServerClient) -> None:
            if self.url in failing:
                raise RolloutError("scripted")
            await real(self)

        monkeypatch.setattr(ServerClient, "end_update", end_update)
        p = publisher(fleet, models[1], models, tmp_path, method)
        p(5)
        assert [s.ready for s in fleet.servers] == [True, False]
        assert {c.version_min for c in generate(fleet)} == {5}
        wait_until(fleet.stale)  # it says that it holds parts of two versions
        failing.clear()
        fleet.run(fleet.control(fleet.servers[1]).end_update())
        p(5)
        assert [s.ready for s in fleet.servers] == [True, True]
        p.close()


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(
    fleet: Fleet, models: tuple[Path, Path], tmp_path: Path
) -> None:
    good = publisher(fleet, models[1], models, tmp_path, "disk")
    good(10)
    before = generate(fleet)

    def wrong() -> Iterator[Bucket]:
        yield [("model.embed_tokens.weight", torch.zeros(3, 3))]

    with pytest.raises(RolloutError, match=r"version 11 was not published in 3 attempts.*embed_tokens"):
        publisher(fleet, models[1], models, tmp_path / "other", "disk", export=wrong)(11)
    assert fleet.version == 10
    wait_until(lambda: fleet.servers[0].ready)
    assert tokens(generate(fleet)) == tokens(before)


def test_verify_notices_a_changed_bit(
    fleet: Fleet, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megasapo.rollout.disk import DiskDelivery

    real = DiskDelivery.send

    def spoil(self: DiskDelivery, bucket: Bucket) -> None:
        real(self, [(n, t * 1.0001 if n == "lm_head.weight" else t) for n, t in bucket])

    monkeypatch.setattr(DiskDelivery, "send", spoil)
    with pytest.raises(RolloutError, match="holds other weights than were published"):
        publisher(fleet, models[1], models, tmp_path, "disk")(12)


def test_a_server_that_refuses_an_update_is_not_sampled_from(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Two servers, one of which refuses: the version is published, and requests go to the other only."""
    fake = str(Path(__file__).with_name("fake_server.py"))
    launch = f'if mkdir "{tmp_path}/first"; then exec "$@"; fi; exec "$@" --refuse-updates'  # mkdir: only one succeeds
    cfg = RolloutConfig(
        engine="sglang",
        spawn=2,
        spawn_command=("bash", "-c", launch, "bash", sys.executable, fake, "{port}"),
        start_timeout_s=TIMEOUT_S,
        deterministic=False,
    )
    with Fleet.start(cfg, models[0], tmp_path / "run") as fleet:
        publisher(fleet, models[1], models, tmp_path, "disk", verify=False)(3)
        assert sorted(s.ready for s in fleet.servers) == [False, True]
        one = SamplingParams(max_new_tokens=1)

        async def run() -> list[Completion]:
            completions = await fleet.generate([(i,) for i in range(1, 9)], [one] * 8)
            await fleet.close()
            return completions

        assert {c.version_min for c in asyncio.run(run())} == {3}
        assert "rollout/wrong_version" not in fleet.take_metrics()


def test_other_ranks_only_export_and_learn_the_outcome(models: tuple[Path, Path], tmp_path: Path) -> None:
    said = iter([None, None])
    drained = []

    def export() -> Iterator[Bucket]:
        for i in range(3):
            drained.append(i)
            yield []

    cfg = RolloutConfig()
    p = Publisher(export, None, cfg, rank=1, agree=lambda _: next(said), run_dir=tmp_path, model_dir=models[0])
    p(1)
    assert drained == [0, 1, 2]
    said = iter(["OSError: disk full", None, "late", "early"])
    with pytest.raises(RolloutError, match="version 2 was not published in 3 attempts: early"):
        Publisher(export, None, cfg, rank=1, agree=lambda _: next(said), run_dir=tmp_path, model_dir=models[0])(2)


def test_rank_0_needs_a_fleet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 0 publishes"):
        Publisher(lambda: iter([]), None, RolloutConfig(), rank=0, agree=print, run_dir=tmp_path, model_dir=tmp_path)
