"""Converted checkpoints in real ranks: any layout starts from them and has the very weights of the HF directory.

pytest starts this file again as 2 ranks (`python -m tests.dist.test_convert ROOT`); rank 0 prints one line a case.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.launcher import ROOT, run_ranks
from tests.tiny import add_mtp, make_model

LAYOUTS = {"tp2": (2, 1, 1), "pp2": (1, 2, 1), "ep2": (1, 1, 2)}
WRITTEN = {  # name: the model, and the layout that it is converted to
    "one": ("moe", ()),
    "many": ("moe", ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
    "mtp": ("glm", ("parallel.tp=2",)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one with a padded vocabulary and one with a layer that the learner leaves out; and checkpoints."""
    root = tmp_path_factory.mktemp("convert")
    make_model(root / "moe", num_experts=4, vocab_size=513, num_hidden_layers=2)
    make_model(root / "glm", "glm4_moe", num_hidden_layers=2)
    add_mtp(root / "glm")
    for name, (model, layout) in WRITTEN.items():
        tool = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "hf-to-megatron", "--verify"]
        arguments = ["--src", str(root / model), "--dst", str(root / name), "--shard-size", "100KB", *layout]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*tool, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "tensors are the source's, bit for bit" in done.stdout
        worst = float(done.stdout.split("logprobs of 95 tokens differ from transformers' by at most ")[1].split()[0])
        assert worst < 1e-4
    return root


def test_any_layout_starts_from_a_converted_checkpoint(root: Path) -> None:
    outputs = run_ranks(2, "tests.dist.test_convert", str(root), logs=root / "logs")
    done = {line.removeprefix("ok ") for line in outputs[0].splitlines() if line.startswith("ok ")}
    assert done == {f"{layout} from {written}" for layout in LAYOUTS for written in WRITTEN}


def _rank_main() -> None:
    from megasapo.errors import ConfigError
    from megasapo.families.mtp import mtp_names
    from megasapo.mcore import bridge, checkpoint, model
    from megasapo.mcore.topology import Topology
    from megasapo.sections import ModelConfig, ParallelConfig

    root = Path(sys.argv[1])
    for layout, (tp, pp, ep) in LAYOUTS.items():
        topo = Topology.init(ParallelConfig(tp=tp, pp=pp, ep=ep))
        for written, (name, _) in WRITTEN.items():
            hf_config, expected = model.read_hf_config(root / name), load_file(root / name / "model.safetensors")
            for carried in mtp_names(hf_config.to_dict(), list(expected)):
                del expected[carried]
            cfg = ModelConfig(path=str(root / name), load=str(root / written), dtype="float32")
            chunks = model.build_model(cfg, hf_config, topo)
            checkpoint.load_start(cfg, chunks, topo)
            found = {
                name: tensor.clone()
                for bucket in bridge.export_hf(chunks, hf_config, topo, bucket_bytes=100_000)
                for name, tensor in bucket
            }
            if topo.rank == 0:
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
                print(f"ok {layout} from {written}", flush=True)
        wrong = ModelConfig(path=str(root / "moe"), load=str(root / "logs"), dtype="float32")
        with pytest.raises(ConfigError, match="no checkpoint there"):
            checkpoint.load_start(wrong, chunks, topo)
        topo.leave()
    topo.destroy()


if __name__ == "__main__":
    _rank_main()
