"""What a training checkpoint holds and how it is read again, by megatron-core's dist_checkpointing.

Called by train.py and sft.py through Policy. `saver.py` writes, `megasapo.checkpoints` keeps the directory. Tensors
have names that depend on no layout; each rank's random state is its own and comes back only in the same layout.
"""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megasapo import checkpoints
from megasapo.checkpoints import FORMAT, CheckpointError, is_checkpoint, latest, step_of
from megasapo.errors import ConfigError
from megasapo.families import mtp
from megasapo.mcore import bridge, compat
from megasapo.mcore.emulation import histories, restore_histories
from megasapo.mcore.optim import Optimizer
from megasapo.mcore.topology import Topology
from megasapo.sections import ModelConfig

__all__ = ["FORMAT", "CheckpointError", "is_checkpoint", "latest", "step_of"]
NOT_WEIGHTS = re.compile(r"(^|\.)optimizer\.|^random\b")  # of a checkpoint's keys
OWN_STATE = re.compile(r"^random\b")


def find(run_dir: Path, topo: Topology, *, verify: bool) -> Path | None:
    """Collective. The checkpoint to continue from: the one that `latest` names, or None without.

    A damaged one is set aside, with a warning, for the newest before it; CheckpointError when there is none.
    """
    if topo.rank == 0:
        checkpoints.clear(run_dir / "checkpoints")
    path = _on_first(topo, lambda: checkpoints.latest(run_dir))
    while path is not None and verify:
        problem = _problem(path, topo)
        if problem is None:
            break
        path = _on_first(topo, partial(checkpoints.set_aside, path, problem))
    return path


def verify(path: Path, topo: Topology) -> None:
    """Collective. CheckpointError unless every file of a checkpoint is as it was written."""
    problem = _problem(path, topo)
    if problem is not None:
        raise CheckpointError(f"{problem}: bring a good copy back, or take another checkpoint")


def _problem(path: Path, topo: Topology) -> str | None:
    """Collective: what is wrong with a checkpoint's files, each of which one rank hashes."""
    try:
        files: dict[str, str] = checkpoints.read_record(path)["files"]
    except checkpoints.Damaged as e:
        return str(e)
    mine = sorted(files)[topo.rank :: topo.world_size]
    found = topo.gather(checkpoints.differences(path, {name: files[name] for name in mine}))
    problems = [problem for part in found for problem in part]
    return f"{path} is damaged: {'; '.join(problems)}" if problems else None


def _on_first(topo: Topology, work: Callable[[], Any]) -> Any:
    """Collective: what rank 0's `work` returns or raises, on every rank."""
    result, error = None, None
    if topo.rank == 0:
        try:
            result = work()
        except CheckpointError as e:
            error = e
    result, error = topo.first((result, error))
    if error is not None:
        raise error
    return result


def contents(
    model: list[torch.nn.Module], optimizer: Optimizer, topo: Topology, trainer_state: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Collective. The sharded state and the record of a checkpoint, for Saver.save.

    `trainer_state` is plain JSON, equal on every rank (step, data position).
    """
    record = {
        "format": FORMAT,
        "step": trainer_state["step"],
        "world_size": topo.world_size,
        "layout": topo.degrees,
        "learner": optimizer.settings(),
        "trainer": trainer_state,
    }
    return _state_dict(model, optimizer, topo, is_loading=False), record


def set_trainer_state(path: Path, trainer_state: dict[str, Any]) -> None:
    """Replace the trainer state of a complete checkpoint, at once or not at all. Called by one rank."""
    checkpoints.write_record(path, checkpoints.read_record(path) | {"trainer": trainer_state})


def load(
    path: Path, model: list[torch.nn.Module], optimizer: Optimizer, topo: Topology, *, seed: int
) -> dict[str, Any]:
    """Collective. Restore model and optimizer in place, in any layout, and random state; returns the trainer state.

    Where the layout is not the one that wrote it, random states begin anew from `seed` and the step.
    """
    record = checkpoints.read_record(path)
    same = record["layout"] == topo.degrees
    template = _state_dict(model, optimizer, topo, is_loading=True)
    if not same:
        del template["random"]
    state, surplus, lacking = _read(path, template)
    _refuse_strays(path, lacking, (key for key in surplus if same or not OWN_STATE.search(key)))
    _load_chunks(path, model, state)
    optimizer.load_state_dict(state["optimizer"], record["learner"])
    if same:
        _set_random_state(state["random"])
        try:
            restore_histories(model, state["random"].get("amax", ()))
        except ValueError as e:
            raise CheckpointError(f"{path}: {e}: resume with the model, layout and precision of the run") from e
    else:
        _reseed(seed + record["step"])
        if topo.rank == 0:
            print(_changed_layout(path, record["layout"], topo.degrees), flush=True)
    return record["trainer"]


def load_start(cfg: ModelConfig, model: list[torch.nn.Module], topo: Topology) -> None:
    """Collective. The weights that a model begins with: those of model.load, else of model.path."""
    start = Path(cfg.load or cfg.path)
    if is_checkpoint(start):
        verify(start, topo)
        load_weights(start, model)
    elif cfg.load and (found := latest(start)) is not None:
        raise ConfigError(f"model.load={cfg.load}: the directory of a run: name one checkpoint of it, such as {found}")
    elif cfg.load:
        raise ConfigError(
            f"model.load={cfg.load}: no checkpoint there (no megasapo.json); give an HF directory as model.path, or "
            "convert it with tools/convert_checkpoint.py"
        )
    else:
        bridge.load_hf(model, start)


def load_weights(path: Path, model: list[torch.nn.Module]) -> None:
    """Collective. The model's weights alone, into any layout and dtype, whatever wrote them."""
    checkpoints.read_record(path)
    template: dict[str, Any] = {name: chunk.sharded_state_dict() for name, chunk in _named(model)}
    state, surplus, lacking = _read(path, template)
    # under HF names, conversion carries layers for multi-token prediction
    others = (key for key in surplus if not NOT_WEIGHTS.search(key) and not mtp.LAYER.match(key))
    _refuse_strays(path, lacking, others)
    _load_chunks(path, model, state)


def _read(path: Path, template: dict[str, Any]) -> tuple[dict[str, Any], set[str], set[str]]:
    """The state, the keys that the template does not ask for, and those that the checkpoint does not have."""
    try:
        # megatron-core calls missing what the template does not ask for, unexpected what the checkpoint does not have
        state, surplus, lacking = dist_checkpointing.load(template, str(path), strict=StrictHandling.RETURN_ALL)
        compat.check_extra_states(state)
    except CheckpointException as e:  # which is no Exception
        raise CheckpointError(
            f"{path} cannot be read: {'; '.join(str(cause) for cause, _ in e.failures.values())}"
        ) from e
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from e
    return state, surplus, lacking


def _changed_layout(path: Path, before: dict[str, int], now: dict[str, int]) -> str:
    changed = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name])
    return (
        f"{path} is of another layout ({changed}): weights, optimizer and data go on exactly; random states, and "
        "largest values that FP8 remembers, begin anew"
    )


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


def _state_dict(model: list[torch.nn.Module], optimizer: Optimizer, topo: Topology, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {name: chunk.sharded_state_dict() for name, chunk in _named(model)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading)
    own = _random_state() | {"amax": histories(model)}  # each rank's
    state["random"] = ShardedObject("random", own, (topo.world_size,), (topo.rank,))
    return state


def _named(model: list[torch.nn.Module]) -> list[tuple[str, Any]]:
    # the keys megatron-core's optimizers expect
    return [("model", model[0])] if len(model) == 1 else [(f"model{i}", chunk) for i, chunk in enumerate(model)]


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    state = {  # tensors and plain values alone: they are read without unpickling anything else
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    # A GPU's generator has another kind of state than a CPU's, and a tracker given the wrong one fails at its next use:
    # a run that changes from one to the other keeps the seeds that it began with.
    if ("cuda" in state) == torch.cuda.is_available():
        tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


def _reseed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
