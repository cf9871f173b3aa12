"""The learner's model against transformers, over processes: logprobs, entropies and gradients in every layout.

pytest starts this file again as N ranks (`python -m tests.dist.test_model LAYOUT MODELS_DIR`); rank 0 saves what the
ranks computed, under HF names, and pytest compares.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.dist import model_reference as given
from tests.dist.launcher import run_ranks

LAYOUTS = {  # world size, tp, pp, ep
    "single": (1, 1, 1, 1),
    "tp2": (2, 2, 1, 1),
    "pp2": (2, 1, 2, 1),
    "ep2": (2, 1, 1, 2),
    "tp2ep2": (2, 2, 1, 2),
    "tp2pp2": (4, 2, 2, 1),
    "tp2ep4": (4, 2, 1, 4),
    "pp2ep2": (4, 1, 2, 2),
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    given.make_models(directory)
    return directory


@cache
def reference(model_dir: Path):
    return given.reference(model_dir)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_agrees_with_transformers(layout: str, models: Path) -> None:
    _compare(layout, *LAYOUTS[layout], models)


@pytest.mark.slow
def test_model_agrees_with_transformers_on_eight_ranks(models: Path) -> None:
    _compare("tp2pp2ep2", 8, 2, 2, 2, models)


def _compare(layout: str, world_size: int, tp: int, pp: int, ep: int, models: Path) -> None:
    out = models / layout
    run_ranks(world_size, "tests.dist.test_model", *map(str, (tp, pp, ep)), str(models), str(out), logs=out)
    names = [name for name in given.MODELS if _fits(name, ep)]
    assert names
    for name in names:
        got = torch.load(out / f"{name}.pt")
        logps, entropies, gradients = reference(models / name)
        assert len(got["logp"]) == len(logps)
        for i, (logp, entropy) in enumerate(zip(logps, entropies, strict=True)):
            assert (got["logp"][i] - logp).abs().max() < TOLERANCE, f"{name} {layout}: logp of sequence {i}"
            assert (got["entropy"][i] - entropy).abs().max() < TOLERANCE, f"{name} {layout}: entropy of sequence {i}"
        assert got["gradients"].keys() == gradients.keys()
        for key, value in gradients.items():
            worst = (got["gradients"][key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert worst < 1e-3, f"{name} {layout}: gradient of {key} is off by {worst:.2e} of its largest entry"


def _fits(model: str, ep: int) -> bool:
    return ep == 1 or given.MODELS[model]["kind"] == "moe"


def _rank_main() -> None:
    from megasapo.config import ParallelConfig
    from megasapo.mcore.topology import Topology

    tp, pp, ep = map(int, sys.argv[1:4])
    models, out = Path(sys.argv[4]), Path(sys.argv[5])
    topo = Topology.init(ParallelConfig(tp=tp, pp=pp, ep=ep))
    for name in given.MODELS:
        if _fits(name, ep):
            result = _run_model(models / name, topo)
            if topo.rank == 0:
                torch.save(result, out / f"{name}.pt")
    topo.barrier()
    topo.destroy()


def _run_model(model_dir: Path, topo) -> dict[str, object]:
    """Forward and backward of all sequences in two micro-batches a rank; gradients exported like weights."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from megasapo.config import ModelConfig
    from megasapo.mcore import bridge, model

    hf_config = model.read_hf_config(model_dir)
    chunks = model.build_model(ModelConfig(path=str(model_dir), dtype="float32"), hf_config, topo)
    bridge.load_hf(chunks, model_dir, topo)
    chunk = chunks[0]
    ddp = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk)
    chunk.config.finalize_model_grads_func = lambda m, _tokens=None, **kwargs: finalize_model_grads(m, None, **kwargs)
    scores = _forward_backward(ddp, _micro_batches(topo), topo)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(parameter.main_grad)
    exported = bridge.export_hf(chunks, hf_config, topo, bucket_bytes=1 << 20)
    gradients = {name: value.clone() for bucket in exported for name, value in bucket}
    merged = {uid: pair for part in topo.gather(scores) for uid, pair in part.items()}
    order = sorted(merged)
    return {
        "logp": [torch.from_numpy(merged[i][0]) for i in order],
        "entropy": [torch.from_numpy(merged[i][1]) for i in order],
        "gradients": gradients,
    }


def _micro_batches(topo) -> list:
    from megasapo.data.packing import pack
    from megasapo.types import TrainSequence

    rows = [
        TrainSequence(i, ids, np.arange(len(ids)) > 0, np.zeros(len(ids), dtype=np.float32), advantage=0.0)
        for i, ids in enumerate(given.sequences())
    ]
    mine = rows[topo.dp_rank :: topo.dp]
    weights = given.token_weights()
    return [pack(part, [weights[row.uid] for row in part], pad_to=topo.tp) for part in (mine[:1], mine[1:])]


def _forward_backward(ddp, micro, topo) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megasapo.data.packing import per_sequence
    from megasapo.mcore.model import forward_micro_batch

    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def forward_step(batches, chunk):
        mb = next(batches)
        output = forward_micro_batch(chunk, mb, temperature=given.TEMPERATURE, topo=topo, with_entropy=True)

        def loss(scores):
            logps, entropies = per_sequence(mb, scores.logp), per_sequence(mb, scores.entropy)
            found.update({uid: (logps[uid], entropies[uid]) for uid in mb.uids})
            total = (mb.weight * (scores.logp + given.ENTROPY_WEIGHT * scores.entropy)).sum()
            return total, torch.tensor(0, dtype=torch.int), {}

        return output, loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro),
        model=ddp,
        num_microbatches=len(micro),
        seq_length=max(mb.tokens.numel() for mb in micro),
        micro_batch_size=1,
        forward_only=False,
    )
    return found


if __name__ == "__main__":
    _rank_main()
