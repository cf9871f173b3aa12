"""One server of each kind for the contract tests: the embedded one, and a real SGLang in its own environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from megasapo.rollout.fleet import Fleet
from megasapo.sections import RolloutConfig
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


def sglang_python() -> Path:
    """The interpreter that launch.sh will use."""
    named = os.environ.get("MEGASAPO_SGLANG_PYTHON")
    return Path(named) if named else HERE.parents[1] / ".venv-sglang" / "bin" / "python"


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
    with Fleet.start(cfg, old, root / "run", routing=True) as fleet:
        headers = {"Authorization": f"Bearer {(root / 'run' / 'api_key').read_text()}"}
        with httpx.Client(base_url=fleet.urls[0], timeout=300.0, trust_env=False, headers=headers) as http:
            yield Contract(engine, fleet, http, old, new, root / "run")
