"""Training checkpoints: megatron-core's dist_checkpointing under RUN/checkpoints/, complete or absent.

Called by train.py and sft.py through Policy. A checkpoint is written into `step_XXXXXXXX.tmp`, renamed when every rank
has finished, and only then does `latest` (replaced atomically) name it: kill -9 at any moment leaves the previous one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling

from megasapo.errors import ConfigError, UserError
from megasapo.mcore import bridge
from megasapo.mcore.emulation import histories, restore_histories
from megasapo.mcore.optim import Optimizer
from megasapo.mcore.topology import Topology
from megasapo.sections import ModelConfig

FORMAT = 2
NOT_WEIGHTS = re.compile(r"(^|\.)optimizer\.|^random\b")  # of a checkpoint's keys


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be read or does not fit this run; the message names it and says what to do."""


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Raises CheckpointError when `latest` names a missing one."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    path = pointer.parent / pointer.read_text().strip()
    if not is_checkpoint(path):
        raise CheckpointError(
            f"{pointer} names {path.name}, which is missing or incomplete: write the name of a complete one into it, "
            "or remove it to start over"
        )
    return path


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a complete training checkpoint."""
    return (path / "megasapo.json").is_file()


def save(
    run_dir: Path,
    step: int,
    model: list[torch.nn.Module],
    optimizer: Optimizer,
    topo: Topology,
    trainer_state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Collective. Write checkpoint `step`, point `latest` at it, remove all but the last `keep` up to it.

    `trainer_state` is plain JSON, equal on every rank (step, data position, schedule).
    """
    folder = run_dir / "checkpoints"
    name = f"step_{step:08d}"
    temporary, final = folder / f"{name}.tmp", folder / name
    if topo.rank == 0:
        for left_over in folder.glob("*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)
    topo.barrier()
    dist_checkpointing.save(_state_dict(model, optimizer, topo, is_loading=False), str(temporary))
    topo.barrier()
    if topo.rank == 0:
        record = {"format": FORMAT, "step": step, "world_size": topo.world_size, "trainer": trainer_state}
        _write_durably(temporary / "megasapo.json", json.dumps(record, indent=1))
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _write_durably(folder / "latest", name)
        # later steps, if any, are a branch that somebody went back from: not ours to remove
        complete = [p for p in folder.glob("step_????????") if (p / "megasapo.json").is_file() and step_of(p) <= step]
        for old in sorted(complete)[:-keep]:
            shutil.rmtree(old)
    topo.barrier()
    return final


def set_trainer_state(path: Path, trainer_state: dict[str, Any]) -> None:
    """Replace the trainer state of a complete checkpoint, at once or not at all. Called by one rank."""
    record = json.loads((path / "megasapo.json").read_text())
    _write_durably(path / "megasapo.json", json.dumps(record | {"trainer": trainer_state}, indent=1))


def load(path: Path, model: list[torch.nn.Module], optimizer: Optimizer, topo: Topology) -> dict[str, Any]:
    """Collective. Restore model, optimizer and random state in place; returns the trainer state."""
    record = _read_record(path)
    if record["world_size"] != topo.world_size:
        raise CheckpointError(
            f"{path} was written by {record['world_size']} ranks and this run has {topo.world_size}: resume with "
            f"--nproc {record['world_size']}"
        )
    template = _state_dict(model, optimizer, topo, is_loading=True)
    # megatron-core calls missing what the template does not ask for, unexpected what the checkpoint does not have
    state, surplus, lacking = dist_checkpointing.load(template, str(path), strict=StrictHandling.RETURN_ALL)
    _refuse_strays(path, lacking, surplus)
    _load_chunks(path, model, state)
    optimizer.load_state_dict(state["optimizer"])
    optimizer.load_schedule_state(state["schedule"])
    _set_random_state(state["random"])
    try:
        restore_histories(model, state["random"].get("amax", ()))
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}: resume with the model, layout and precision of the run") from e
    return record["trainer"]


def load_start(cfg: ModelConfig, model: list[torch.nn.Module], topo: Topology) -> None:
    """Collective. The weights that a model begins with: those of model.load, else of model.path."""
    start = Path(cfg.load or cfg.path)
    if is_checkpoint(start):
        load_weights(start, model)
    elif cfg.load:
        raise ConfigError(
            f"model.load={cfg.load}: no checkpoint there (no megasapo.json); give an HF directory as model.path, or "
            "convert it with tools/convert_checkpoint.py"
        )
    else:
        bridge.load_hf(model, start, topo)


def load_weights(path: Path, model: list[torch.nn.Module]) -> None:
    """Collective. The model's weights alone, into any layout and dtype, whatever wrote them."""
    _read_record(path)
    template: dict[str, Any] = {name: chunk.sharded_state_dict() for name, chunk in _named(model)}
    state, surplus, lacking = dist_checkpointing.load(template, str(path), strict=StrictHandling.RETURN_ALL)
    _refuse_strays(path, lacking, (key for key in surplus if not NOT_WEIGHTS.search(key)))
    _load_chunks(path, model, state)


def _load_chunks(path: Path, model: list[torch.nn.Module], state: dict[str, Any]) -> None:
    for name, chunk in _named(model):
        found = chunk.load_state_dict(state[name], strict=False)
        _refuse_strays(path, found.missing_keys, found.unexpected_keys)


def _refuse_strays(path: Path, lacking: Iterable[str], surplus: Iterable[str]) -> None:
    """CheckpointError for whatever does not match, but Transformer Engine's scales, which a model may have or not.

    They begin anew where a checkpoint comes from a CPU, and have no use where it comes to one.
    """
    strays = {
        what: sorted(key for key in keys if not key.endswith("_extra_state"))
        for what, keys in (("has no", lacking), ("has, and this model not,", surplus))
    }
    problems = [f"{what} {', '.join(keys[:5])} ({len(keys)} in all)" for what, keys in strays.items() if keys]
    if problems:
        raise CheckpointError(f"{path} does not fit this model: it {'; it '.join(problems)}")


def _read_record(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((path / "megasapo.json").read_text())
    if record["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {record['format']}, this version reads {FORMAT}: finish the run with the version that "
            "began it, or start another run.name from its exported HF directory (model.path=RUN/hf)"
        )
    return record


def _state_dict(model: list[torch.nn.Module], optimizer: Optimizer, topo: Topology, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {name: chunk.sharded_state_dict() for name, chunk in _named(model)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading)
    state["schedule"] = optimizer.schedule_state()
    own = _random_state() | {"amax": histories(model)}  # each rank's
    state["random"] = ShardedObject("random", own, (topo.world_size,), (topo.rank,))
    return state


def _named(model: list[torch.nn.Module]) -> list[tuple[str, Any]]:
    # the keys megatron-core's optimizers expect
    return [("model", model[0])] if len(model) == 1 else [(f"model{i}", chunk) for i, chunk in enumerate(model)]


def _random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    # A GPU's generator has another kind of state than a CPU's, and a tracker given the wrong one fails at its next use:
    # a run that changes from one to the other keeps the seeds that it began with.
    if ("cuda" in state) == torch.cuda.is_available():
        get_cuda_rng_tracker().set_states(state["megatron"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(path)
