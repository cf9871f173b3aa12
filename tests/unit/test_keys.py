"""API keys: which of file and environment counts, what is refused, and that no key is shown."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from megasapo import evaluate as evaluation
from megasapo import keys
from megasapo.errors import ConfigError
from megasapo.evaluate import main as evaluate
from megasapo.rollout.fleet import Fleet
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
