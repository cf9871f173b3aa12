"""`megasapo score`: teacher-forced logprobs of given token sequences, computed by the learner in any parallel layout.

Reads lines {"input_ids": [n ids]}, writes lines {"logprobs": [n - 1 floats]} in the same order: that of each token
after the first, given those before it. Defaults to fp32; `model.dtype=bfloat16` scores as training computes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megasapo import config, run
from megasapo.config import Config, ConfigError
from megasapo.data.files import DataError, read_records
from megasapo.geometry import read_geometry
from megasapo.layout import check_layout

if TYPE_CHECKING:
    from megasapo.mcore.topology import Topology
    from megasapo.types import MicroBatch


def main(argv: list[str]) -> int:
    """Entry of the command; starts the ranks it needs and runs on each."""
    parser = argparse.ArgumentParser(prog="megasapo score", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="HF_DIR")
    parser.add_argument("--data", required=True, type=Path, metavar="IN.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="OUT.jsonl")
    parser.add_argument(
        "--nproc", type=int, help="ranks to start on this machine (default: as few as the layout needs)"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="such as parallel.tp=2 or model.dtype=bfloat16")
    args = parser.parse_intermixed_args(argv)
    raw = {"model": {"path": args.model, "dtype": "float32"}}
    cfg = config.from_dict(raw, args.overrides, source="megasapo score")
    nproc = run.world_size(cfg.parallel, args.nproc)
    geometry = read_geometry(args.model)
    check_layout(cfg.parallel, nproc, geometry)
    try:
        sequences = read_sequences(args.data, geometry.vocab)
    except DataError as e:
        raise ConfigError(str(e)) from e
    code = run.on_ranks("score", argv, nproc)
    if code is None:
        _score_on_rank(cfg, sequences, args.out)
    return code or 0


def read_sequences(path: Path, vocab_size: int) -> list[np.ndarray]:
    """The `input_ids` of each line, [n] int32. Raises DataError naming the line of anything else."""
    sequences = []
    for line, record in read_records(path):
        ids = record.get("input_ids")
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise DataError(f"{path}:{line}: input_ids must be a list of at least one integer, found {str(ids)[:60]}")
        wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise DataError(f"{path}:{line}: token id {wrong} is outside the model's vocabulary of {vocab_size}")
        sequences.append(np.asarray(ids, dtype=np.int32))
    return sequences


def _score_on_rank(cfg: Config, sequences: Sequence[np.ndarray], out: Path) -> None:
    from megasapo.mcore.topology import Topology

    topo = Topology.init(cfg.parallel, seed=cfg.run.seed)
    try:
        scored = score(cfg, sequences, topo)
        if topo.rank == 0:
            _write(out, scored)
        topo.barrier()
    finally:
        topo.destroy()


def score(cfg: Config, sequences: Sequence[np.ndarray], topo: Topology) -> list[np.ndarray]:
    """Collective. [n - 1] float32 logprobs of each sequence of n ids, on every rank.

    Logits are divided by `rollout.temperature`, as servers report logprobs.
    """
    from megasapo.data.packing import Pieces, join, pieces
    from megasapo.mcore import bridge, model, step

    chunks = model.build_model(cfg.model, model.read_hf_config(cfg.model.path), topo)
    bridge.load_hf(chunks, cfg.model.path, topo)
    micro = _micro_batches(sequences, cfg.train.micro_batch_tokens, topo)
    logps = step.logprobs(chunks, micro, topo, temperature=cfg.rollout.temperature)
    mine: Pieces = {}
    if topo.is_last_stage:
        for mb, logp in zip(micro, logps, strict=True):
            assert logp is not None, "the last stage has logprobs"
            mine |= pieces(mb, logp)
    found = join(topo.gather(mine))
    nothing = np.zeros(0, dtype=np.float32)  # a single token has nothing before it
    return [found[i] if len(ids) > 1 else nothing for i, ids in enumerate(sequences)]


def _micro_batches(sequences: Sequence[np.ndarray], max_tokens: int, topo: Topology) -> list[MicroBatch]:
    """This data-parallel rank's share, as many on every rank, at least one; a longer sequence is packed by itself."""
    from megasapo.data.packing import pack

    rows = [_row(i, ids) for i, ids in enumerate(sequences) if len(ids) > 1]
    packs: list[list[Any]] = [[]]
    used = 0
    for row in rows:
        slots = topo.shard.slots_for(len(row.tokens))
        if packs[-1] and used + slots > max_tokens:
            packs.append([])
            used = 0
        packs[-1].append(row)
        used += slots
    packs += [[] for _ in range(-len(packs) % (topo.dp * topo.micro_batch_multiple))]
    mine = packs[topo.dp_rank :: topo.dp]
    return [pack(part, np.zeros(len(part), dtype=np.float32), shard=topo.shard).to(topo.device) for part in mine]


def _row(index: int, ids: np.ndarray) -> Any:
    from megasapo.types import TrainSequence

    scored = np.arange(len(ids)) > 0
    return TrainSequence(index, ids, scored, np.zeros(len(ids), dtype=np.float32), advantage=0.0)


def _write(out: Path, scored: Sequence[np.ndarray]) -> None:
    temporary = out.with_name(out.name + ".new")
    with temporary.open("w") as f:
        for logprobs in scored:
            f.write(json.dumps({"logprobs": logprobs.tolist()}) + "\n")
    os.replace(temporary, out)
