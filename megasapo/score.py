"""`megasapo score`: teacher-forced logprobs of given token sequences, computed by the learner in any parallel layout.

Reads lines {"input_ids": [n ids]}, writes lines {"logprobs": [n - 1 floats]} in the same order: that of each token
after the first, given those before it. A line's "routing" is forced on the model's routers: [at most n - 1][MoE
layers][K] expert ids, row t those of input token t, -1 in all K places for what the router is to choose. With --routing
the experts that were used are written alike. Defaults to fp32; `model.dtype=bfloat16` scores as training computes.
"""

from __future__ import annotations

import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megasapo import config, run
from megasapo.arguments import Parser
from megasapo.config import Config, ConfigError
from megasapo.data.files import DataError, read_records
from megasapo.geometry import Geometry, read_geometry
from megasapo.layout import check_layout
from megasapo.placed import placed, refuse_unwritable

if TYPE_CHECKING:
    from megasapo.mcore.topology import Topology


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input."""

    ids: np.ndarray  # [n] int32
    routing: np.ndarray | None = None  # [at most n - 1, L, K] int32; None: routers choose


def main(argv: list[str]) -> int:
    """Entry of the command; starts the ranks it needs and runs on each."""
    parser = Parser(prog="megasapo score", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="of an HF model or a converted checkpoint")
    parser.add_argument("--data", required=True, type=Path, metavar="IN.jsonl", help='lines {"input_ids": [...]}')
    parser.add_argument("--out", required=True, type=Path, metavar="OUT.jsonl")
    parser.add_argument("--routing", action="store_true", help="write the experts that were used, too")
    parser.add_argument(
        "--nproc", type=int, help="ranks to start on this machine (default: as few as the layout needs)"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="such as parallel.tp=2 or model.dtype=bfloat16"
    )
    args = parser.parse_intermixed_args(argv)
    refuse_unwritable(args.out, "--out")
    raw = {"model": {"path": args.model, "dtype": "float32"}}
    cfg = config.from_dict(raw, args.overrides, source="megasapo score")
    nproc = run.world_size(cfg.parallel, args.nproc)
    geometry = read_geometry(args.model)
    check_layout(cfg.parallel, nproc, geometry)
    if args.routing and not geometry.experts:
        raise ConfigError(f"--routing: model_type={geometry.model_type!r} has no experts")
    try:
        lines = read_lines(args.data, geometry)
    except DataError as e:
        raise ConfigError(str(e)) from e
    code = run.on_ranks("score", argv, nproc, [cfg.parallel])
    if code is None:
        _score_on_rank(cfg, lines, args.out, args.routing)
    return code or 0


def read_lines(path: Path, geometry: Geometry) -> list[Line]:
    """The lines of the input for a model of these sizes. Raises DataError naming the line of anything else."""
    lines = []
    for number, record in read_records(path):
        where = f"{path}:{number}"
        ids = record.get("input_ids")
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise DataError(f"{where}: input_ids must be a list of at least one integer, found {str(ids)[:60]}")
        wrong = next((i for i in ids if not 0 <= i < geometry.vocab), None)
        if wrong is not None:
            raise DataError(f"{where}: token id {wrong} is outside the model's vocabulary of {geometry.vocab}")
        routing = record.get("routing")
        if routing is not None:
            routing = _read_routing(routing, where, len(ids) - 1, geometry)
        lines.append(Line(np.asarray(ids, dtype=np.int32), routing))
    return lines


def _read_routing(value: Any, where: str, slots: int, geometry: Geometry) -> np.ndarray | None:
    num_layers, k = sum(geometry.moe_layers), geometry.top_k
    expected = f"[at most {slots} tokens][{num_layers} MoE layers][{k} experts]"
    if not num_layers:
        raise DataError(f"{where}: routing of a model without experts ({geometry.model_type})")
    if value == []:
        return None
    try:
        routing = np.asarray(value)
    except ValueError as e:  # lists of different lengths
        raise DataError(f"{where}: routing must be {expected}, found lists of different lengths") from e
    if routing.dtype.kind != "i" or routing.shape[1:] != (num_layers, k) or len(routing) > slots:
        raise DataError(f"{where}: routing must be integers {expected}, found {routing.dtype} {list(routing.shape)}")
    ordered = np.sort(routing, axis=-1)
    bad = (ordered[..., 0] < 0) | (ordered[..., -1] >= geometry.experts) | (np.diff(ordered) == 0).any(-1)
    bad &= (routing != -1).any(-1)
    if bad.any():
        token, column = (int(i) for i in np.argwhere(bad)[0])
        layer = [i for i, sparse in enumerate(geometry.moe_layers) if sparse][column]
        raise DataError(
            f"{where}: routing of token {token} in layer {layer} is {routing[token, column].tolist()}: expected {k} "
            f"different experts from 0 to {geometry.experts - 1}, or -1 in all places"
        )
    return routing.astype(np.int32)


def _score_on_rank(cfg: Config, lines: Sequence[Line], out: Path, with_routing: bool) -> None:
    from megasapo.mcore.topology import Topology

    topo = Topology.init(cfg.parallel, seed=cfg.run.seed, rows=cfg.precision.rows)
    try:
        records = score(cfg, lines, topo, with_routing=with_routing)
        if topo.rank == 0:
            with placed(out) as unfinished, unfinished.open("w") as f:
                f.writelines(json.dumps(record) + "\n" for record in records)
            print(f"{out}: {len(records)} sequences", flush=True)
        topo.barrier()
    finally:
        topo.destroy()


def score(cfg: Config, lines: Sequence[Line], topo: Topology, *, with_routing: bool = False) -> list[dict[str, Any]]:
    """Collective. The record of each line that goes into the output, on every rank."""
    from megasapo.mcore.scorer import Scorer

    scorer = Scorer(cfg, topo)
    scorer.load(Path(cfg.model.load or cfg.model.path))
    forced = [line.routing for line in lines]
    scored = scorer.score(
        [line.ids for line in lines],
        forced if any(routing is not None for routing in forced) else None,
        with_routing=with_routing,
    )
    records: list[dict[str, Any]] = []
    for one, routing in zip(scored, forced, strict=True):
        record: dict[str, Any] = {"logprobs": one.logp.tolist()}
        if with_routing:
            record["routing"] = [] if one.choices is None else used(one.choices, routing).tolist()
        records.append(record)
    return records


def used(choices: np.ndarray, forced: np.ndarray | None) -> np.ndarray:
    """[n - 1, L, K] the experts that did the work: the forced ones, and the router's choice where none were."""
    experts = choices.astype(np.int32)
    if forced is not None:
        experts[: len(forced)] = np.where(forced < 0, experts[: len(forced)], forced)
    return experts
