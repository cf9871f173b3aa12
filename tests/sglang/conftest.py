"""One server of each kind for the contract tests: the embedded one, and a real SGLang in its own environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from megasapo.rollout import watch
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.spawn import server_command
from megasapo.sections import RolloutConfig
from tests.sglang.path import brake
from tests.tiny import make_model

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Contract:
    """A running server and the two models of one shape that it may hold: it starts with `old`."""

    engine: str
    fleet: Fleet
    http: httpx.Client
    old: Path
    new: Path
    run_dir: Path

    @property
    def brake(self) -> Path:
        """The file with which servers started `with_brake` go slowly."""
        return self.run_dir / "brake"


def sglang_python() -> Path:
    """The interpreter that launch.sh will use."""
    named = os.environ.get("MEGASAPO_SGLANG_PYTHON")
    return Path(named) if named else HERE.parents[1] / ".venv-sglang" / "bin" / "python"


@contextmanager
def with_brake(file: Path) -> Iterator[None]:
    """Servers that a fleet starts in this block heed the brake `file`, embedded ones and SGLang's (path/brake.py)."""

    def command(*args: Any, **kwargs: Any) -> list[str]:
        words = server_command(*args, **kwargs)
        embedded = words[:3] == [sys.executable, "-m", "megasapo.rollout.local"]
        return [sys.executable, brake.__file__, *words[3:]] if embedded else words

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "server_command", command)
        patch.setenv(brake.VARIABLE, str(file))
        yield


def client(url: str, headers: dict[str, str] | None = None) -> httpx.Client:
    """With a connection for each request: a server closes those that are idle, now and then just as one is used."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, timeout=300.0, trust_env=False, headers=headers, limits=limits)


@pytest.fixture(scope="module", params=["embedded", pytest.param("sglang", marks=pytest.mark.sglang)])
def contract(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    engine, root = request.param, tmp_path_factory.mktemp(request.param)
    flags = ["--dtype", "float32"]
    if engine == "sglang" and not sglang_python().exists():
        pytest.fail(f"no SGLang environment at {sglang_python()}: run tests/sglang/setup.sh, or pytest -m 'not sglang'")
    cfg = RolloutConfig(
        engine=engine,
        spawn_command=(str(HERE / "launch.sh"), "{model}", "{port}", "{api_key_file}"),
        server_args=(*flags, "--threads", "1") if engine == "embedded" else tuple(flags),
        deterministic=False,
        max_staleness=1,
        max_restarts=0,
        start_timeout_s=400.0,
        retry_for_s=120.0,
        request_timeout_s=300.0,
    )
    old, new = make_model(root / "old", seed=1), make_model(root / "new", seed=2)
    run_dir = root / "run"
    with with_brake(run_dir / "brake"), Fleet.start(cfg, old, run_dir, routing=True) as fleet:
        with client(fleet.urls[0], {"Authorization": f"Bearer {(run_dir / 'api_key').read_text()}"}) as http:
            yield Contract(engine, fleet, http, old, new, run_dir)
