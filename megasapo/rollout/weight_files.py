"""The weights of an HF directory on disk: which files there are, what is in them, and writing a new one.

Used by disk delivery, by quantise.py and by the embedded server. It knows tensors by name and nothing of models.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megasapo.rollout.protocol import RolloutError

Bucket = list[tuple[str, torch.Tensor]]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}


class WeightError(RolloutError, ValueError):
    """Weights were refused; the message says which and why. The old ones are intact."""


class Entry(NamedTuple):
    shape: list[int]
    dtype: torch.dtype


def shards(directory: Path) -> list[Path]:
    """The safetensors files, by the index where there is one. All of them exist."""
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise WeightError(f"{index}: not a safetensors index: {e!r}") from e
        files = [directory / name for name in names]
    else:
        files = [directory / SINGLE]
    absent = [str(s) for s in files if not s.is_file()]
    if absent:
        raise WeightError(f"no such weights: {', '.join(absent)}")
    return files


def entries(directory: Path) -> dict[str, Entry]:
    """Shape and dtype of every tensor. Raises WeightError for files that cannot be read."""
    found: dict[str, Entry] = {}
    try:
        for shard in shards(directory):
            with safe_open(shard, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118  safe_open is not a mapping
                    part = f.get_slice(name)
                    dtype = DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise WeightError(f"{shard}: tensor {name!r} has dtype {part.get_dtype()}: use {list(DTYPES)}")
                    found[name] = Entry(list(part.get_shape()), dtype)
    except (OSError, SafetensorError) as e:
        raise WeightError(f"{directory}: cannot read the weights: {e}") from e
    return found


def tensors(directory: Path, names: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors (None: all), one at a time. Raises WeightError for files that cannot be read."""
    try:
        for shard in shards(directory):
            with safe_open(shard, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118
                    if names is None or name in names:
                        yield name, f.get_tensor(name)
    except (OSError, SafetensorError) as e:
        raise WeightError(f"{directory}: cannot read the weights: {e}") from e


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json. Raises RolloutError when it cannot be read."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise RolloutError(f"{path}: cannot read the model's configuration: {e}") from e
    if not isinstance(config, dict):
        raise RolloutError(f"{path}: expected an object, found {type(config).__name__}")
    return config


class Writer:
    """An HF directory that comes to be under another name, bucket by bucket, and is in place only when complete."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._unfinished = target.with_name(f".{target.name}.unfinished")
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)

    def add(self, bucket: Bucket) -> None:
        """One more file, of these tensors. Raises RolloutError for a name that is there already."""
        if not bucket:
            return
        file = f"model-{len(set(self._weight_map.values())) + 1:05d}.safetensors"
        for name, tensor in bucket:
            if name in self._weight_map:
                raise RolloutError(f"the export has tensor {name!r} twice")
            self._weight_map[name] = file
            self._bytes += tensor.nbytes
        contents = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket}
        save_file(contents, self._unfinished / file, metadata={"format": "pt"})

    def finish(self, companions: Path, config: dict[str, Any] | None = None) -> None:
        """Index, and what lies beside the weights in `companions`, its config.json replaced by `config`; in place.

        A directory that is there already is replaced.
        """
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
        (self._unfinished / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))
        for file in sorted(companions.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and not file.name.startswith("."):
                shutil.copyfile(file, self._unfinished / file.name)
        if config is not None:
            (self._unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.rmtree(self.target, ignore_errors=True)
        self._unfinished.rename(self.target)

    def abandon(self) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)
