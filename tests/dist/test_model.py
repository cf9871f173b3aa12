"""The learner's model against transformers, over processes: logprobs, entropies and gradients in every layout.

pytest starts this file again as N ranks (`python -m tests.dist.test_model LAYOUTS PORTS MODELS_DIR`), once for each
world size; rank 0 saves what the ranks computed, under HF names, and pytest compares.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from megasapo.data.packing import Pieces, join, pieces
from tests.dist import model_reference as given
from tests.dist.launcher import free_ports, run_ranks

LAYOUTS = {  # world size: tp, pp, ep, cp
    1: {"single": (1, 1, 1, 1)},
    2: {"tp2": (2, 1, 1, 1), "pp2": (1, 2, 1, 1), "ep2": (1, 1, 2, 1), "tp2ep2": (2, 1, 2, 1), "cp2": (1, 1, 1, 2)},
    4: {"tp2pp2": (2, 2, 1, 1), "tp2ep4": (2, 1, 4, 1), "pp2ep2": (1, 2, 2, 1)},
    8: {"tp2pp2ep2": (2, 2, 2, 1)},
}
CASES = [
    pytest.param(world_size, layout, model, marks=pytest.mark.slow if world_size == 8 else (), id=f"{layout}-{model}")
    for world_size, layouts in LAYOUTS.items()
    for layout, (_tp, _pp, ep, cp) in layouts.items()
    for model in given.MODELS
    if (cp == 1 or model == "deepseek_v3")  # which rotates otherwise; test_parity has it with the others
    and (ep == 1 or model != "dense")
    and (world_size < 4 or given.MODELS[model]["kind"] in ("moe", "dense"))
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    given.make_models(directory)
    return directory


@cache
def reference(model_dir: Path):
    return given.reference(model_dir)


@cache
def computed(world_size: int, models: Path) -> Path | AssertionError:
    """Run all layouts of a world size once; the directory of their results, or why there are none."""
    layouts = LAYOUTS[world_size]
    ports = ",".join(map(str, free_ports(len(layouts))))  # a process group for each layout
    out = models / f"ranks{world_size}"
    try:
        run_ranks(world_size, "tests.dist.test_model", str(world_size), ports, str(models), logs=out)
    except AssertionError as e:
        return e  # kept, so that a hang is waited for once and not by every case
    return out


@pytest.mark.parametrize(("world_size", "layout", "model"), CASES)
def test_model_agrees_with_transformers(world_size: int, layout: str, model: str, models: Path) -> None:
    results = computed(world_size, models)
    if isinstance(results, AssertionError):
        raise results
    got = torch.load(results / f"{layout}-{model}.pt")
    logps, entropies, gradients = reference(models / model)
    assert len(got["logp"]) == len(logps)
    for i, (logp, entropy) in enumerate(zip(logps, entropies, strict=True)):
        assert (got["logp"][i] - logp).abs().max() < TOLERANCE, f"logp of sequence {i}"
        assert (got["entropy"][i] - entropy).abs().max() < TOLERANCE, f"entropy of sequence {i}"
    assert got["gradients"].keys() == gradients.keys()
    for key, value in gradients.items():
        worst = (got["gradients"][key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert worst < 1e-3, f"gradient of {key} is off by {worst:.2e} of its largest entry"


def _rank_main() -> None:
    from megasapo.sections import ParallelConfig
    from megasapo.mcore.topology import Topology

    world_size, ports, models = int(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3])
    for port, (layout, (tp, pp, ep, cp)) in zip(ports, LAYOUTS[world_size].items(), strict=True):
        os.environ["MASTER_PORT"] = port
        topo = Topology.init(ParallelConfig(tp=tp, pp=pp, ep=ep, cp=cp))
        for name in given.MODELS:
            if (world_size, layout, name) in {tuple(case.values) for case in CASES}:
                result = _run_model(models / name, topo)
                if topo.rank == 0:
                    torch.save(result, models / f"ranks{world_size}" / f"{layout}-{name}.pt")
        topo.barrier()
        topo.destroy()


def _run_model(model_dir: Path, topo) -> dict[str, object]:
    """Forward and backward of all sequences in two micro-batches a rank; gradients exported like weights."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from megasapo.sections import ModelConfig
    from megasapo.mcore import bridge, model

    hf_config = model.read_hf_config(model_dir)
    chunks = model.build_model(ModelConfig(path=str(model_dir), dtype="float32"), hf_config, topo)
    bridge.load_hf(chunks, model_dir)
    chunk = chunks[0]
    ddp = DistributedDataParallel(chunk.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk)
    chunk.config.finalize_model_grads_func = lambda m, _tokens=None, **kwargs: finalize_model_grads(m, None, **kwargs)
    scores = _forward_backward(ddp, _micro_batches(topo), topo)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(parameter.main_grad)
    exported = bridge.export_hf(chunks, hf_config, topo, bucket_bytes=1 << 20)
    gradients = {name: value.clone() for bucket in exported for name, value in bucket}
    logps, entropies = (join(parts) for parts in zip(*topo.gather(scores), strict=True))
    return {
        "logp": [torch.from_numpy(logps[i]) for i in sorted(logps)],
        "entropy": [torch.from_numpy(entropies[i]) for i in sorted(entropies)],
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
    return [pack(part, [weights[row.uid] for row in part], shard=topo.shard) for part in (mine[:1], mine[1:])]


def _forward_backward(ddp, micro, topo) -> tuple[Pieces, Pieces]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megasapo.mcore.model import forward_micro_batch

    found: tuple[Pieces, Pieces] = ({}, {})

    def forward_step(batches, chunk):
        mb = next(batches)
        output = forward_micro_batch(chunk, mb, temperature=given.TEMPERATURE, topo=topo, with_entropy=True)

        def loss(scores):
            for kept, values in zip(found, (scores.logp, scores.entropy), strict=True):
                kept.update(pieces(mb, values))
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
