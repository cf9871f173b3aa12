"""A server that asks for two keys, as only others start one: which call takes which, and what the wrong one says."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megasapo import keys
from megasapo.keys import Keys
from megasapo.rollout.client import ServerClient
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import Refused, RolloutError
from megasapo.rollout.spawn import end_group
from megasapo.sections import RolloutConfig
from megasapo.types import SamplingParams
from tests.dist.launcher import free_ports
from tests.sglang.calls import assert_serves, publish
from tests.sglang.conftest import HERE, Contract, client, sglang_python
from tests.tiny import make_model

BOTH = Keys("key-for-sampling", "key-for-control")
QUESTIONS = ("generate", "model_info", "server_info")
CONTROL = ("pause", "begin_update", "end_update", "flush", "stamp", "resume", "abort", "checksum", "destroy_group")


@dataclass(frozen=True)
class Guarded:
    engine: str
    url: str
    old: Path
    new: Path
    root: Path

    def config(self, given: Keys) -> RolloutConfig:
        """Of a run with these keys in files."""
        files: dict[str, Any] = {}
        for name, key in (("api_key_file", given.api), ("admin_api_key_file", given.admin)):
            if key is not None:
                files[name] = str(self.root / f"{key}.txt")
                Path(files[name]).write_text(key)
        settings: dict[str, Any] = {"deterministic": False, "start_timeout_s": 400.0, "request_timeout_s": 120.0}
        return RolloutConfig(engine=self.engine, servers=(self.url,), **files, **settings)


@pytest.fixture(scope="module", params=["embedded", pytest.param("sglang", marks=pytest.mark.sglang)])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    engine, root = request.param, tmp_path_factory.mktemp(request.param)
    [port] = free_ports(1)
    old, new = make_model(root / "old", seed=1), make_model(root / "new", seed=2)
    (root / "key").write_text(f"{BOTH.api}\n")
    if engine == "embedded":
        command = [sys.executable, "-m", "megasapo.rollout.local", "--model", str(old), "--port", str(port)]
        command += ["--api-key-file", str(root / "key"), "--threads", "1"]
    else:
        if not sglang_python().exists():
            pytest.fail(f"no SGLang environment at {sglang_python()}: run tests/sglang/setup.sh")
        command = [str(HERE / "launch.sh"), str(old), str(port), str(root / "key")]
    guard = [sys.executable, "-m", "megasapo.rollout.spawn", "--"]  # the server ends with these tests, however they end
    environment = os.environ | {keys.ADMIN_VARIABLE: str(BOTH.admin)}
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [*guard, *command, "--dtype", "float32"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    guarded = Guarded(engine, f"http://127.0.0.1:{port}", old, new, root)
    try:
        with Fleet.start(guarded.config(BOTH), old, root / "first"):
            yield guarded
    finally:
        end_group(process, 30.0)
    assert BOTH.api not in (root / "log").read_text()
    assert BOTH.admin not in (root / "log").read_text()


@contextmanager
def running(guarded: Guarded, given: Keys, run_dir: Path) -> Iterator[Contract]:
    with Fleet.start(guarded.config(given), guarded.old, run_dir) as fleet, client(guarded.url) as http:
        yield Contract(guarded.engine, fleet, http, guarded.old, guarded.new, run_dir)


def outcomes(url: str, given: Keys) -> dict[str, str]:
    """What each call of the client comes to, and the words about a key that is wrong."""

    async def run() -> dict[str, str]:
        client, found = ServerClient(url, given, question_timeout_s=60.0), {}
        arguments: dict[str, tuple[Any, ...]] = {
            "generate": ([(5, 6)], [SamplingParams(max_new_tokens=2)]),
            **{"pause": ("retract",), "stamp": ("default",), "abort": ("nobody",), "destroy_group": ("none",)},
        }
        for name in ("check_health", *QUESTIONS, *CONTROL):
            try:
                await getattr(client, name)(*arguments.get(name, ()))
                found[name] = "done"
            except Refused as e:
                hint = re.search(r"401: Unauthorized, .*: see (\S+)", str(e))
                found[name] = hint[1] if hint else f"{e.status}"
            except RolloutError:
                found[name] = "done"  # of another kind than a key: SGLang's checksum is none of ours
        await client.close()
        return found

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "question", "control"),
    [
        (BOTH, "done", "done"),
        (Keys(BOTH.api, None), "done", "rollout.admin_api_key_file"),
        (Keys(None, BOTH.admin), "rollout.api_key_file", "done"),
        (Keys(BOTH.admin, BOTH.api), "rollout.api_key_file", "rollout.admin_api_key_file"),
        (Keys("wrong", "neither"), "rollout.api_key_file", "rollout.admin_api_key_file"),
        (Keys(), "rollout.api_key_file", "rollout.admin_api_key_file"),
    ],
    ids=["both", "no admin key", "only the admin key", "swapped", "wrong", "none"],
)
def test_each_call_takes_its_own_key(guarded: Guarded, given: Keys, question: str, control: str) -> None:
    expected = {"check_health": "done", **dict.fromkeys(QUESTIONS, question), **dict.fromkeys(CONTROL, control)}
    if control == "done":
        expected["destroy_group"] = "400"  # there is none
        if guarded.engine == "sglang":
            expected["checksum"] = "400"  # it needs CUDA
    assert outcomes(guarded.url, given) == expected


def test_a_run_with_a_wrong_key_ends_before_its_first_step(guarded: Guarded, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"/model_info: 401: .*: see rollout\.api_key_file"):
        Fleet.start(guarded.config(Keys("wrong", BOTH.admin)), guarded.old, tmp_path)
    with running(guarded, Keys(BOTH.api, "wrong"), tmp_path) as contract:
        assert_serves(contract, guarded.old, -1)
        for method in ("disk", "tensor"):
            wanted = r"not published in 3 attempts: .*/pause_generation: 401: .*: see rollout\.admin_api_key_file"
            with pytest.raises(RolloutError, match=wanted):
                publish(contract, guarded.new, 1, method)
        assert_serves(contract, guarded.old, -1)


def test_weights_are_published_in_every_way_with_both_keys(guarded: Guarded, tmp_path: Path) -> None:
    with running(guarded, BOTH, tmp_path) as contract:
        for version, method in enumerate(("disk", "distributed", "tensor"), 1):
            directory = guarded.new if version % 2 else guarded.old
            publish(contract, directory, version, method)
            assert_serves(contract, directory, version)
