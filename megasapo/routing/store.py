"""Files of diagnosed steps below RUN/routing/diagnosis: the figures as JSON, some responses token by token as parquet.

Written by train, read by report and whoever wants to (docs/routing.md). Both files of a step are complete or absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megasapo.errors import UserError
from megasapo.placed import placed
from megasapo.routing.decompose import Decomposition, gate
from megasapo.routing.flips import flips
from megasapo.routing.scored import ScoredSequence

Columns = Mapping[str, np.ndarray]


def token_rows(
    sequence: ScoredSequence,
    *,
    reward: float,
    decode: Callable[[tuple[int, ...]], str],
    tau_pos: float,
    tau_neg: float,
) -> dict[str, np.ndarray]:
    """Columns with one value a loss token, broken ones included; `decode` gives the text of token ids.

    uid, position (in the response), token_id, token, advantage, reward, rollout_logp, the terms, log_ratio (their
    sum), gate (SAPO's w at it), flips_mismatch and flips_drift (MoE layers whose set of experts changed).
    """
    loss = sequence.loss_mask
    n = int(np.count_nonzero(loss))
    ids, terms = sequence.tokens[loss], sequence.terms()[loss]
    with np.errstate(invalid="ignore"):  # of broken tokens
        log_ratio = terms.sum(axis=1)
    before, held, now = (
        routing[loss] for routing in (sequence.routing_rollout, sequence.routing_behaviour, sequence.routing_current)
    )
    return {
        "uid": np.full(n, sequence.uid, dtype=np.int64),
        "position": sequence.positions()[loss].astype(np.int32),
        "token_id": ids.astype(np.int32),
        "token": np.asarray([decode((int(i),)) for i in ids], dtype=object),
        "advantage": np.full(n, sequence.advantage, dtype=np.float32),
        "reward": np.full(n, reward, dtype=np.float32),
        "rollout_logp": sequence.rollout_logp[loss].astype(np.float32),
        **{name: terms[:, i].astype(np.float32) for i, name in enumerate(sequence.term_names)},
        "log_ratio": log_ratio.astype(np.float32),
        "gate": gate(log_ratio, sequence.advantage, tau_pos=tau_pos, tau_neg=tau_neg).astype(np.float32),
        "flips_mismatch": flips(before, held).layers_changed.astype(np.int32),
        "flips_drift": flips(held, now).layers_changed.astype(np.int32),
    }


def write_diagnosis(
    run_dir: Path,
    step: int,
    decomposition: Decomposition,
    rows: Sequence[Columns],
    *,
    behaviour_version: int,
    current_version: int,
) -> Path:
    """Both files of a step; `rows` are `token_rows` of some sequences. The path of the JSON.

    The JSON is put in its place last: where it is, the other one is too.
    """
    import pyarrow as pa
    from pyarrow import parquet

    versions = {"behaviour_version": behaviour_version, "current_version": current_version}
    document = {"step": step} | versions | decomposition.to_json()
    with placed(_tokens_path(run_dir, step)) as unfinished:
        table = pa.concat_tables([pa.table(dict(columns)) for columns in rows]) if rows else pa.table({})
        parquet.write_table(table, unfinished, compression="zstd")
    path = _folder(run_dir) / f"step_{step:08d}.json"
    with placed(path) as unfinished:
        unfinished.write_text(json.dumps(document, allow_nan=False))
    return path


def cut_diagnosis(run_dir: Path, last_step: int) -> None:
    """Remove the files of steps after `last_step`, which a resumed or rolled-back run does again."""
    for path in [*_folder(run_dir).glob("step_*.json"), *_folder(run_dir).glob("step_*.tokens.parquet")]:
        if int(path.name[5:13]) > last_step:
            path.unlink()


def read_diagnosis(run_dir: Path, *, newest: int | None = None) -> list[dict[str, Any]]:
    """What `write_diagnosis` wrote, by step, or the last `newest` of it; empty without any.

    UserError naming a file that cannot be read.
    """
    found = []
    paths = sorted(_folder(run_dir).glob("step_*.json"))
    for path in paths if newest is None else paths[-newest:]:
        try:
            found.append(json.loads(path.read_text()))
        except ValueError as e:
            raise UserError(f"{path} is not a diagnosis: {e}; restore or remove it") from e
    return found


def read_tokens(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """The columns of `token_rows` of a diagnosed step, one sequence after the other. UserError: there is none."""
    from pyarrow import parquet

    path = _tokens_path(run_dir, step)
    if not path.exists():
        steps = [
            int(other.name.split(".")[0].removeprefix("step_"))
            for other in sorted(_folder(run_dir).glob("step_*.tokens.parquet"))
        ]
        raise UserError(f"{path} does not exist; steps with tokens: {steps or 'none'}")
    table = parquet.read_table(path)
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def _folder(run_dir: Path) -> Path:
    return run_dir / "routing" / "diagnosis"


def _tokens_path(run_dir: Path, step: int) -> Path:
    return _folder(run_dir) / f"step_{step:08d}.tokens.parquet"
