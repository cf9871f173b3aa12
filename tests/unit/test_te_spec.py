"""Models of Transformer Engine's layers, built on a CPU where they cannot run: names, checkpoints, replay, recipes.

Skipped where Transformer Engine is not installed. Without a GPU the library keeps it away from megatron-core for good,
so the checks run in a process of their own, `python -m tests.unit.test_te_spec NAME DIR`, that lets it through.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.tiny import make_model

WIDTHS = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "moe": WIDTHS | {"moe_intermediate_size": 128, "num_experts": 4, "mlp_only_layers": [1]},
    "dense": WIDTHS | {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_transformer_engine(kind: Any, tmp_path: Path) -> None:
    try:
        importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Transformer Engine is not installed")
    make_model(tmp_path / "model", kind, **MODELS[kind])
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.test_te_spec", kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def main(kind: str, directory: Path) -> None:
    _let_through()
    from safetensors.torch import load_file

    from megasapo.mcore import bridge
    from megasapo.mcore.replay import RoutingReplay
    from megasapo.mcore.topology import Topology
    from megasapo.sections import ParallelConfig, PrecisionConfig

    topo = Topology.init(ParallelConfig())
    te, local = (_build(directory / "model", topo, use_te=use_te) for use_te in (True, False))
    assert "TEGroupedMLP" in _classes(te) or kind == "dense"
    assert not [name for name in _classes(local) if name.startswith("TE")]
    assert te[0].config.gradient_accumulation_fusion

    # every parameter has a rule, and weights go in and out
    bridge.load_hf(te, directory / "model")
    hf = load_file(directory / "model" / "model.safetensors")
    config = json.loads((directory / "model" / "config.json").read_text())
    found = {n: t.clone() for bucket in bridge.export_hf(te, config, topo, bucket_bytes=2**20) for n, t in bucket}
    assert found.keys() == hf.keys()
    assert all(torch.equal(found[name], hf[name].bfloat16()) for name in hf)

    # a checkpoint of one kind of layers is read by the other
    _through_checkpoint(directory / "te", te, local)
    _same(_exported(te, config, topo), _exported(local, config, topo))
    fresh = _build(directory / "model", topo, use_te=True)
    _through_checkpoint(directory / "local", local, fresh)
    _same(_exported(te, config, topo), _exported(fresh, config, topo))

    if kind == "moe":
        assert RoutingReplay(te).layers == (0,)
    for recipe in ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"):
        cfg = PrecisionConfig(recipe=recipe)
        quantised = _build(directory / "model", topo, use_te=True, precision=cfg)[0]
        assert str(quantised.config.fp8_recipe).endswith(recipe.removeprefix("fp8_"))
    topo.destroy()


def _let_through() -> None:
    spec = importlib.util.find_spec("megasapo")
    assert spec is not None
    path = Path(str(spec.origin)).parent / "mcore" / "cpu.py"
    loading = importlib.util.spec_from_file_location("megasapo.mcore.cpu", path)
    assert loading is not None
    assert loading.loader is not None
    cpu: Any = importlib.util.module_from_spec(loading)
    loading.loader.exec_module(cpu)
    cpu.KEPT_AWAY = ()
    sys.modules["megasapo.mcore.cpu"] = cpu


def _build(path: Path, topo: Any, *, use_te: bool, precision: Any = None) -> list[Any]:
    from megasapo.mcore import model
    from megasapo.mcore import precision as resolved
    from megasapo.sections import ModelConfig

    with (
        mock.patch.object(torch.cuda, "is_available", return_value=use_te),  # or Transformer Engine makes no layer
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=mock.Mock(major=9, minor=0)),
        mock.patch.object(resolved, "why_not", return_value=""),
    ):
        hf = model.read_hf_config(path)
        return list(model.build_model(ModelConfig(path=str(path)), hf, topo, precision=precision))


def _classes(chunks: list[Any]) -> set[str]:
    return {type(module).__name__ for module in chunks[0].modules()}


def _exported(chunks: list[Any], config: dict[str, Any], topo: Any) -> dict[str, torch.Tensor]:
    from megasapo.mcore import bridge

    return {n: t.clone() for bucket in bridge.export_hf(chunks, config, topo, bucket_bytes=2**20) for n, t in bucket}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def _through_checkpoint(path: Path, source: list[Any], target: list[Any]) -> None:
    from megatron.core import dist_checkpointing

    from megasapo import checkpoints
    from megasapo.mcore import checkpoint

    path.mkdir()
    dist_checkpointing.save({"model": source[0].sharded_state_dict()}, str(path))
    checkpoints.write_record(path, {"format": checkpoints.FORMAT})
    checkpoint.load_weights(path, target)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
