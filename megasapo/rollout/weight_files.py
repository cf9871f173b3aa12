"""The weights of an HF directory written to disk, bucket by bucket. Used by disk delivery and by quantise.py.

It knows tensors by name and nothing of models.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megasapo.hf_files import INDEX
from megasapo.rollout.protocol import RolloutError

Bucket = list[tuple[str, torch.Tensor]]
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


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
