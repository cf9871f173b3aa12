"""API keys: which of file and environment counts, what is refused, and that no key is shown."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megasapo import evaluate as evaluation
from megasapo import keys
from megasapo.errors import ConfigError
from megasapo.evaluate import main as evaluate
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.spawn import SGLANG_WITH_KEY
from megasapo.sections import RolloutConfig
from tests.unit.load import model
from tests.unit.standin_server import Standin, serving


def test_a_file_counts_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys.read() == keys.Keys(None, None)
    monkeypatch.setenv(keys.VARIABLE, " of-the-environment\n")
    assert keys.read() == keys.Keys("of-the-environment", None)
    assert keys.read(environment=False) == keys.Keys(None, None)
    (tmp_path / "key").write_text("of-the-file\n")
    monkeypatch.setenv(keys.ADMIN_VARIABLE, "of-the-admin")
    read = keys.read(str(tmp_path / "key"))
    assert (read.api, read.admin, read.control) == ("of-the-file", "of-the-admin", "of-the-admin")
    assert repr(read) == "Keys()"


def test_what_is_no_key_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*/missing"):
        keys.read(str(tmp_path / "missing"))
    (tmp_path / "two").write_text("one two")
    with pytest.raises(ConfigError, match="/two: expected one key, ASCII, without spaces"):
        keys.read(str(tmp_path / "two"))
    monkeypatch.setenv(keys.VARIABLE, "schlüssel")
    with pytest.raises(ConfigError, match="MEGASAPO_API_KEY: expected one key") as e:
        keys.read()
    assert "schl" not in str(e.value)
    monkeypatch.setenv(keys.VARIABLE, "same")
    monkeypatch.setenv(keys.ADMIN_VARIABLE, "same")
    with pytest.raises(ConfigError, match="are the same"):
        keys.read()


def test_sglang_with_a_key_says_in_one_line_what_it_lacks(tmp_path: Path) -> None:
    def start(*arguments: str) -> str:
        plain = [sys.executable, "-S", str(SGLANG_WITH_KEY), *arguments]  # without packages, so without SGLang
        ended = subprocess.run(plain, env={}, capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert ended.stdout == ""
        return ended.stderr

    assert start().startswith("`python sglang_with_key.py KEY_FILE [flags]`")
    missing = start(str(tmp_path / "missing"), "--model-path", "m")
    assert re.fullmatch(r"the API key cannot be read: .*/missing'; `-` as first argument .*MEGASAPO_API_KEY\n", missing)
    (tmp_path / "key").write_text("long enough")
    assert "expected one key of at least 8 characters, without spaces" in start(str(tmp_path / "key"))
    (tmp_path / "key").write_text("a-key-of-ours")
    assert start(str(tmp_path / "key")) == (
        f"{sys.executable} has no SGLang: name the python that has (rollout.spawn_command, SERVER_PYTHON)\n"
    )


def test_running_servers_get_the_environments_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.VARIABLE, "of-the-environment")
    monkeypatch.setenv(keys.ADMIN_VARIABLE, "of-the-admin")
    with serving(Standin(["ok"])) as server:
        cfg = RolloutConfig(servers=(server.url,), deterministic=False, start_timeout_s=20.0)
        with Fleet.start(cfg, model(tmp_path / "model"), tmp_path / "run") as fleet:
            fleet.run(fleet.control(fleet.servers[0]).resume())
    asked = {(path, headers.get("authorization")) for path, headers in server.asked}
    assert ("/model_info", "Bearer of-the-environment") in asked
    assert ("/continue_generation", "Bearer of-the-admin") in asked


@pytest.mark.parametrize("end", ["", "/"])
def test_evaluate_asks_a_running_server_with_the_key(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.VARIABLE, "of-the-environment")
    with serving(Standin(["ok"])) as server:
        with pytest.raises(ConfigError, match=r"its /model_info names no model: .*set model\.path"):
            evaluate(["--url", server.url + end])
    assert [(path, headers["authorization"]) for path, headers in server.asked] == [
        ("/model_info", "Bearer of-the-environment")
    ]


def test_evaluate_takes_a_url_and_the_path_that_its_server_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_served_model", lambda _url, _keys: "/models/moe #2")
    cfg = evaluation._config(Namespace(config=None, overrides=["data.eval=x.jsonl"], url="http://[::1]:30000"))
    assert (cfg.rollout.servers, cfg.model.path) == (("http://[::1]:30000",), "/models/moe #2")
