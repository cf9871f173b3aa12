"""A real SGLang loads and updates what is written and sent as block FP8, and then says what the embedded server says.

On a CPU without AMX SGLang has no FP8 kernels: their products are written out in torch (path/sgl_fp8_on_cpu.py); names,
shapes, fusing of scales, loading and updating are SGLang's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from megasapo.publish import Bucket, Publisher
from megasapo.rollout.fleet import Fleet
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.quantise import quantise_checkpoint
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams
from tests.asking import ask
from tests.serving import serving
from tests.sglang.conftest import HERE, sglang_python
from tests.tiny import make_model

pytestmark = pytest.mark.sglang
SIZES: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "head_dim": 64, "intermediate_size": 256}
SIZES |= {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 128}
PROMPTS = [tuple(range(20, 40)), (300, 41, 9, 17, 400, 401, 402)]
GREEDY = SamplingParams(max_new_tokens=16, temperature=0.0, ignore_eos=True)


def start(model: Path, run_dir: Path, *environment: str) -> Fleet:
    if not sglang_python().exists():
        pytest.fail(f"no SGLang environment at {sglang_python()}: run tests/sglang/setup.sh, or pytest -m 'not sglang'")
    cfg = RolloutConfig(
        engine="sglang",
        spawn_command=("env", *environment, str(HERE / "launch.sh"), "{model}", "{port}", "{api_key_file}"),
        server_args=("--dtype", "float32") if environment else (),
        deterministic=False,
        max_restarts=0,
        start_timeout_s=400.0,
        request_timeout_s=120.0,
    )
    return Fleet.start(cfg, model, run_dir)


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {name: make_model(root / name, seed=seed, **SIZES) for seed, name in enumerate(("old", "new"))}
    for name in ("old", "new"):
        quantise_checkpoint(found[name], root / f"{name}8")
        found[f"{name}8"] = root / f"{name}8"
    return found


def embedded_logprobs(directory: Path, completions: list[Completion]) -> np.ndarray:
    """Of the same tokens, teacher-forced."""
    with serving(directory, dtype="float32") as server:
        found = []
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            answer = server.generate(
                input_ids=[*prompt, *completion.output_ids],
                sampling_params={"max_new_tokens": 1},
                return_logprob=True,
                logprob_start_len=0,
            )
            found += [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][len(prompt) :]]
    return np.array(found)


def assert_serves(fleet: Fleet, dirs: dict[str, Path], name: str) -> None:
    """Summing in another order moves a value over a rounding boundary now and then; FP8 itself moves all of them."""
    completions = ask(fleet, PROMPTS, GREEDY)
    said = np.concatenate([c.logprobs for c in completions])
    own, plain = (embedded_logprobs(dirs[d], completions) for d in (f"{name}8", name))
    assert np.abs(said - plain).mean() > 0.02
    assert np.abs(said - own).mean() < 0.1 * np.abs(said - plain).mean()


def publish(fleet: Fleet, dirs: dict[str, Path], name: str, version: int, method: Any, run_dir: Path) -> None:
    def export() -> Iterator[Bucket]:
        tensors = list(load_file(dirs[name] / "model.safetensors").items())
        for i in range(0, len(tensors), 10):
            yield tensors[i : i + 10]

    cfg = RolloutConfig(quantization="fp8_block", publish=method, start_timeout_s=100.0)
    p = Publisher(export, fleet, cfg, rank=0, agree=lambda x: x, run_dir=run_dir, model_dir=dirs[name])
    p(version)
    p.close()


def test_sglang_holds_what_was_written_and_sent(dirs: dict[str, Path], tmp_path: Path) -> None:
    with start(dirs["old8"], tmp_path, "MEGASAPO_SGLANG_FP8=torch") as fleet:
        assert_serves(fleet, dirs, "old")
        publish(fleet, dirs, "new", 1, "disk", tmp_path)
        assert_serves(fleet, dirs, "new")
        publish(fleet, dirs, "old", 2, "distributed", tmp_path)
        assert_serves(fleet, dirs, "old")
        publish(fleet, dirs, "new", 3, "tensor", tmp_path)
        assert_serves(fleet, dirs, "new")


def test_without_amx_sglang_loads_the_weights_and_then_misses_its_kernels(
    dirs: dict[str, Path], tmp_path: Path
) -> None:
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has AMX, for which SGLang has kernels that its wheels for the CPU bring")
    with pytest.raises(RolloutError, match="Fp8LinearMethod on CPU requires that CPU has AMX support"):
        start(dirs["old8"], tmp_path)
