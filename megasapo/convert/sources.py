"""Checkpoints as HF-named tensors, whatever they are: an HF directory, or a megatron-core checkpoint of any layout.

Called by every command here. Tensors are read one at a time, when asked for; nothing is kept but the last weight.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from megasapo import checkpoints
from megasapo.convert.errors import ConvertError
from megasapo.families.mtp import mtp_names
from megasapo.families.weights import Piece
from megasapo.geometry import read_config
from megasapo.hf_files import INDEX, SINGLE, TensorSpec, has_weights
from megasapo.mcore import checkpoint
from megasapo.mcore.blueprint import Stored, blueprint
from megasapo.mcore.bridge.export import copy_out
from megasapo.mcore.bridge.placement import Placed, nearest
from megasapo.mcore.bridge.save import Carried
from megasapo.mcore.torch_dist import StoredTensors
from megasapo.overrides import yaml_mistake
from megasapo.sections import ParallelConfig


class Source(Protocol):
    """HF-named tensors: DequantisedFiles are one."""

    @property
    def specs(self) -> list[TensorSpec]: ...

    def read(self, name: str) -> torch.Tensor: ...


class MegatronSource:
    """The weights of a megatron-core checkpoint, under the HF names of the model in `hf_dir`; an optimizer is ignored.

    Layers for multi-token prediction come as they are from the checkpoint, or from `beside` where it has none.
    Raises ConvertError, before anything is read, when tensors are missing, left over or of the wrong shape.
    """

    def __init__(self, directory: Path, hf_dir: Path, beside: Carried | None = None) -> None:
        self.stored = StoredTensors(directory)
        self.blueprint = blueprint(hf_dir, ParallelConfig())
        own = KeySource(self.stored)
        names = set(mtp_names(read_config(hf_dir), self.stored.tensors))
        carried = [spec for spec in own.specs if spec.name in names]
        self.carried: dict[str, Source] = {spec.name: own for spec in carried}
        if beside and not carried:
            carried = beside.specs
            self.carried = {spec.name: beside for spec in carried}
        _refuse_misfits(self.stored, self.blueprint.stored, names, hf_dir)
        self._pieces: dict[str, list[Stored]] = defaultdict(list)  # of each local weight, by its megatron-core name
        for piece in self.blueprint.stored:
            self._pieces[piece.placed.mcore_name].append(piece)
        self._parts: dict[str, list[tuple[Placed, Piece]]] = defaultdict(list)
        specs: dict[str, TensorSpec] = {}
        for placed in sorted(self.weights, key=lambda placed: placed.order):
            for source, (name, shape) in enumerate(zip(placed.names, placed.shapes, strict=True)):
                self._parts[name] += [(placed, piece) for piece in placed.pieces if piece.source == source]
                specs.setdefault(name, TensorSpec(name, shape, self.dtype(placed)))
        self.specs = [*specs.values(), *carried]
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def weights(self) -> list[Placed]:
        """The model's own weights, which HF tensors are cut or joined to."""
        return [placed for placed in self.blueprint.locals[0].placed if placed.is_primary]

    def dtype(self, placed: Placed) -> torch.dtype:
        return self.stored.dtype(self._pieces[placed.mcore_name][0].key)

    def read(self, name: str) -> torch.Tensor:
        if name in self.carried:
            return self.carried[name].read(name)
        first, piece = self._parts[name][0]
        full = torch.empty(first.shapes[piece.source], dtype=self.dtype(first))
        for placed, piece in self._parts[name]:
            copy_out(self.weight(placed), piece, full)
        return full

    def weight(self, placed: Placed) -> torch.Tensor:
        """One of `weights`; it must not be written to. Padding that the checkpoint lacks is zero."""
        if self._last is None or self._last[0] != placed.mcore_name:
            self._last = None  # before the next is made
            padded = any(piece.may_be_padded for piece in self._pieces[placed.mcore_name])
            make = torch.zeros if padded else torch.empty
            weight = make(placed.tensor.shape, dtype=self.dtype(placed))
            for piece in self._pieces[placed.mcore_name]:
                self.stored.read(piece.key, piece.offset, piece.of(weight))
            self._last = placed.mcore_name, weight
        return self._last[1]


class KeySource:
    """A megatron-core checkpoint of an unknown model, under its own keys; an optimizer is left out."""

    def __init__(self, stored: StoredTensors) -> None:
        self._stored = stored
        keys = [key for key in self._stored.tensors if not checkpoint.NOT_WEIGHTS.search(key)]
        self.specs = [TensorSpec(key, self._stored.shape(key), self._stored.dtype(key)) for key in keys]

    def read(self, name: str) -> torch.Tensor:
        whole = torch.zeros(self._stored.shape(name), dtype=self._stored.dtype(name))
        self._stored.read(name, (0,) * whole.dim(), whole)
        return whole


def _refuse_misfits(stored: StoredTensors, pieces: list[Stored], carried: set[str], hf_dir: Path) -> None:
    wanted = {piece.key: piece for piece in pieces}
    where = f"{stored.directory}: the model of {hf_dir}"
    for key, piece in wanted.items():
        if key not in stored.tensors:
            near = nearest(key, list(stored.tensors))
            raise ConvertError(f"{where} needs tensor {key!r}, which the checkpoint does not have ({near})")
        found, expected = stored.shape(key), piece.global_shape
        vocab = piece.placed.shapes[0][0]  # without padding
        fits = found[1:] == expected[1:] and found[0] >= vocab if piece.may_be_padded else found == expected
        if not fits:
            raise ConvertError(
                f"{stored.file(key)}: tensor {key!r} has shape {list(found)}, {hf_dir} needs {list(expected)}: the "
                "checkpoint is of another model; name its HF directory with --model"
            )
    known = wanted.keys() | carried
    strays = [key for key in stored.tensors if key not in known and not checkpoint.NOT_WEIGHTS.search(key)]
    if strays:
        near = nearest(strays[0], list(wanted))
        raise ConvertError(
            f"{stored.file(strays[0])}: tensor {strays[0]!r} belongs to no weight of the model of {hf_dir} ({near}); "
            f"{len(strays)} in all"
        )


def is_megatron(directory: Path) -> bool:
    """Whether a directory is a megatron-core checkpoint, rather than an HF one."""
    return (directory / ".metadata").is_file()


def resolved(directory: Path) -> Path:
    """A checkpoint's own directory: of a run's, or its checkpoints/, the newest. ConvertError when there is nothing."""
    if not directory.is_dir():
        raise ConvertError(f"{directory}: {'a file, not a' if directory.exists() else 'no such'} directory")
    is_folder = directory.name == "checkpoints" and (directory / "latest").is_file()
    found = checkpoints.latest(directory.parent if is_folder else directory) or directory
    if not is_megatron(found) and not has_weights(found):
        pickled = next(found.glob("*.bin"), None)
        hint = f"; {pickled.name} is no safetensors file: load and save it with transformers" if pickled else ""
        raise ConvertError(
            f"{found}: neither an HF directory ({SINGLE} or {INDEX}) nor a megatron-core checkpoint (.metadata), nor "
            f"the directory of a run with one{hint}"
        )
    return found


def model_of(directory: Path, given: str | None) -> Path:
    """The HF directory (config.json, tokenizer) that a megatron-core checkpoint's weights belong to.

    Named by the user, else the checkpoint itself where the converter wrote it, else model.path of its run.
    """
    if given is not None:
        candidate, whence = Path(given), "--model"
    elif (directory / "config.json").is_file():
        return directory
    else:
        settings = run_settings(directory)
        if settings is None:
            raise ConvertError(
                f"{directory}: nothing says which model this is (no config.json, and no config.yaml of its run): name "
                "the model's HF directory with --model"
            )
        candidate, whence = Path(settings["model"]["path"]), "model.path of its run"
    if not (candidate / "config.json").is_file():
        raise ConvertError(f"{candidate}: no config.json there ({whence}): name the model's HF directory with --model")
    return candidate


def run_settings(directory: Path) -> dict[str, Any] | None:
    """The config.yaml of the run whose checkpoint this is, with model.path in it; None where there is no such run."""
    path = directory.absolute().parent.parent / "config.yaml"
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError) as e:
        raise ConvertError(f"{path}: not a YAML file: {yaml_mistake(e)}") from e
    model = found.get("model") if isinstance(found, dict) else None
    return found if isinstance(model, dict) and isinstance(model.get("path"), str) else None


def refuse_damaged(directory: Path) -> None:
    """ConvertError when a file of a checkpoint is not as its record says it was written; an HF directory has none."""
    problems = checkpoints.differences(directory, record_of(directory).get("files", {}))
    if problems:
        raise ConvertError(f"{directory} is damaged: {'; '.join(problems)}: take another copy of the checkpoint")


def record_of(directory: Path) -> dict[str, Any]:
    """What megasapo.json of a checkpoint says; empty without. Raises CheckpointError for one that is damaged or old."""
    return checkpoints.read_record(directory) if checkpoints.is_checkpoint(directory) else {}
