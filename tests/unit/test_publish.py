"""Weights reach real embedded servers bit for bit, in each way of publishing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from megasapo.publish import Bucket, Publisher
from megasapo.rollout.broadcast import Broadcast
from megasapo.rollout.client import ServerClient
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.local import payload
from megasapo.rollout.online import OnlineDelivery
from megasapo.rollout.protocol import RolloutError
from megasapo.sections import RolloutConfig
from tests.unit.publishing import (
    ONLINE,
    export_of,
    generate,
    greedy_by_transformers,
    memory_in_use,
    older,
    publisher,
    tokens,
    wait_until,
)


@pytest.mark.parametrize("method", ["disk", "distributed", "tensor"])
def test_servers_have_the_learners_weights_after_a_publish(
    fleet: Fleet, dirs: list[Path], tmp_path: Path, method: str
) -> None:
    """`verify` compares the server's hash with the export's; the greedy tokens are those of transformers."""
    before = memory_in_use()
    expected = {m: greedy_by_transformers(m) for m in dirs}
    assert expected[dirs[0]] != expected[dirs[1]]
    for version, source in ((1, dirs[1]), (2, dirs[0]), (3, dirs[1])):
        p = publisher(fleet, source, dirs, tmp_path, method)
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
    dirs: list[Path],
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
    p = publisher(fleet, dirs[1], dirs, tmp_path, method, verify=False)
    p(4)
    p.close()
    order = [path for path, _ in groupby(calls)]  # a bucket is a call
    after = ["/flush_cache", "/update_weight_version", "/continue_generation"]
    assert order == ["/pause_generation", *update, *after]


def test_each_rank_of_a_server_gets_a_payload_of_its_own(
    fleet: Fleet, dirs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    p = publisher(fleet, dirs[0], dirs, tmp_path, "tensor")
    p(4)
    assert tokens(generate(fleet)) == greedy_by_transformers(dirs[0])
    sizes["dp_size"] = 2
    with pytest.raises(RolloutError, match=r"dp_size=2, rollout\.publish=distributed and tensor need 1"):
        p(5)


def test_a_group_serves_many_broadcasts(fleet: Fleet, dirs: list[Path], tmp_path: Path) -> None:
    p = publisher(fleet, dirs[1], dirs, tmp_path, "distributed")
    for version in (4, 5, 6):
        p(version)
    delivery = p._delivery
    assert isinstance(delivery, OnlineDelivery)
    assert isinstance(delivery._channel, Broadcast)
    assert delivery._channel.groups_made == 1
    p.close()


@ONLINE
def test_servers_without_update_sessions_are_updated_too(dirs: list[Path], tmp_path: Path, method: str) -> None:
    """The protocol of SGLang up to 0.5.17."""
    with Fleet.start(older(), dirs[0], tmp_path) as fleet:
        assert not fleet.run(fleet.control(fleet.servers[0]).begin_update())
        p = publisher(fleet, dirs[1], dirs, tmp_path, method)
        p(1)
        p.close()
        completions = generate(fleet)
        assert tokens(completions) == greedy_by_transformers(dirs[1])
        assert {c.version_min for c in completions} == {1}


@ONLINE
def test_only_changed_tensors_are_sent_and_all_of_them_to_a_server_that_was_restarted(
    fleet: Fleet, dirs: list[Path], tmp_path: Path, method: str
) -> None:
    tensors = dict(tensor for bucket in export_of(dirs[1]) for tensor in bucket)

    def export() -> Iterator[Bucket]:
        yield list(tensors.items())

    p = publisher(fleet, dirs[1], dirs, tmp_path, method, export=export, changed_only=True)
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


def test_verify_notices_a_changed_bit(
    fleet: Fleet, dirs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megasapo.rollout.disk import DiskDelivery

    real = DiskDelivery.send

    def spoil(self: DiskDelivery, bucket: Bucket) -> None:
        real(self, [(n, t * 1.0001 if n == "lm_head.weight" else t) for n, t in bucket])

    monkeypatch.setattr(DiskDelivery, "send", spoil)
    with pytest.raises(RolloutError, match="holds other weights than were published"):
        publisher(fleet, dirs[1], dirs, tmp_path, "disk")(12)


def test_other_ranks_only_export_and_learn_the_outcome(dirs: list[Path], tmp_path: Path) -> None:
    said = iter([None, None])
    drained = []

    def export() -> Iterator[Bucket]:
        for i in range(3):
            drained.append(i)
            yield []

    cfg = RolloutConfig()
    p = Publisher(export, None, cfg, rank=1, agree=lambda _: next(said), run_dir=tmp_path, model_dir=dirs[0])
    p(1)
    assert drained == [0, 1, 2]
    said = iter(["OSError: disk full", None, "late", "early"])
    with pytest.raises(RolloutError, match="version 2 was not published in 3 attempts: early"):
        Publisher(export, None, cfg, rank=1, agree=lambda _: next(said), run_dir=tmp_path, model_dir=dirs[0])(2)


def test_rank_0_needs_a_fleet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 0 publishes"):
        Publisher(lambda: iter([]), None, RolloutConfig(), rank=0, agree=print, run_dir=tmp_path, model_dir=tmp_path)
