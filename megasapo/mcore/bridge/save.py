"""A megatron-core model -> an HF directory that is there in full or not at all. Called by the policy and by converters.

Rank 0 writes safetensors as buckets arrive, so no shard file is ever held in memory; other ranks send and wait.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megasapo.checkpoints import sync
from megasapo.families.mtp import exported_config, mtp_layers, mtp_names
from megasapo.families.weights import BridgeError
from megasapo.geometry import read_config
from megasapo.hf_files import DTYPE_NAMES, INDEX, SINGLE, TensorSpec, has_weights
from megasapo.mcore.bridge.dequantised import DequantisedFiles
from megasapo.mcore.bridge.export import Export, NamedTensors, split_by_bytes
from megasapo.mcore.topology import Topology
from megasapo.placed import unwritable

log = logging.getLogger(__name__)
GIB = 2**30
COMPANIONS = (  # beside config.json, what an HF directory needs to be served
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "tiktoken.model",
    "*.py",  # config.json's auto_map names them, and some tokenizers are nothing else
)


def save_hf(
    chunks: Sequence[nn.Module],
    hf_config_dir: str | Path,
    out_dir: str | Path,
    topo: Topology,
    *,
    bucket_bytes: int,
    max_shard_bytes: int = 5 * GIB,
) -> None:
    """Write an HF directory: weights, and config.json, tokenizer and generation settings of `hf_config_dir`.

    Collective. Returns on every rank once `out_dir` is complete. An existing `out_dir` is replaced. A
    tensor larger than `max_shard_bytes` gets a file of its own. Layers for
    multi-token prediction, which the model does not have, are copied from the files of `hf_config_dir`. Raises
    Unwritable on rank 0 where the disk is full, say.
    """
    config = read_config(hf_config_dir)
    out = Path(out_dir)
    if out.exists() and not (out / "config.json").is_file():
        raise BridgeError(
            f"{out}: exists and is not an HF directory, so it is not replaced; remove it or save elsewhere"
        )
    export = Export(chunks, config, topo)
    if topo.rank != 0:
        for _ in export.buckets(bucket_bytes):
            pass
    else:
        carried = Carried(Path(hf_config_dir), config)
        specs = [*export.tensors, *carried.specs]
        buckets = ([(spec.name, carried.read(spec.name))] for spec in carried.specs)
        names = [spec.name for spec in specs]
        unfinished = out.with_name(f".{out.name}.unfinished")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            _write_weights(specs, chain(export.buckets(bucket_bytes), buckets), unfinished, max_shard_bytes)
            write_companions(Path(hf_config_dir), exported_config(config, names), specs, unfinished)
            _put_in_place(unfinished, out)
        except OSError as e:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise unwritable(out, e) from e
        say_mtp(hf_config_dir, names)
    dist.barrier(group=topo.world_group_cpu)


class Carried:
    """The layers for multi-token prediction in the files of an HF directory, FP8 as `fp8_as`; none without files."""

    def __init__(self, directory: Path, config: dict[str, Any], fp8_as: torch.dtype = torch.bfloat16) -> None:
        self.specs: list[TensorSpec] = []
        if mtp_layers(config) and has_weights(directory):
            self._files = DequantisedFiles(directory, fp8_as)
            self.specs = [self._files.spec(name) for name in mtp_names(config, self._files.names)]

    def read(self, name: str) -> torch.Tensor:
        return self._files.read(name)


def say_mtp(hf_config_dir: str | Path, names: Collection[str]) -> None:
    """One line about the layers for multi-token prediction of a model, if it has any, in an export of these tensors."""
    config = read_config(hf_config_dir)
    if mtp_layers(config):
        said = "are as they were before training" if mtp_names(config, names) else "are left out, for want of files"
        log.warning("the layers for multi-token prediction of %s %s", hf_config_dir, said)


def _write_weights(
    tensors: list[TensorSpec], buckets: Iterable[NamedTensors], directory: Path, max_shard_bytes: int
) -> None:
    files = assign_files(tensors, max_shard_bytes)
    file_of = {spec.name: file for file, specs in files.items() for spec in specs}
    writers = {file: SafetensorsWriter(directory / file, specs) for file, specs in files.items()}
    for bucket in buckets:
        for name, tensor in bucket:
            writers[file_of[name]].write(name, tensor)
    for writer in writers.values():
        writer.finish()
    write_weight_map(directory, files)


def write_weight_map(directory: Path, files: dict[str, list[TensorSpec]]) -> None:
    """Which file has which tensor, where there are several."""
    if len(files) > 1:
        total = sum(spec.nbytes for specs in files.values() for spec in specs)
        weight_map = {spec.name: file for file, specs in files.items() for spec in specs}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def assign_files(tensors: list[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """File names and what goes into each, in order."""
    shards = split_by_bytes(tensors, lambda spec: spec.nbytes, max_shard_bytes)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


class SafetensorsWriter:
    """One safetensors file written tensor by tensor: the header first, from the specs, then the data in their order."""

    def __init__(self, path: Path, specs: list[TensorSpec]) -> None:
        self._path = path
        self._expected = list(reversed(specs))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for spec in specs:
            offsets = [at, at + spec.nbytes]
            header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            at += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # data starts on a multiple of 8, as the safetensors library has it
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor; its name, shape and dtype must be those of the next spec."""
        spec = self._expected.pop()
        assert (name, tuple(tensor.shape), tensor.dtype) == spec, f"{name} {tensor.shape} {tensor.dtype}, not {spec}"
        with self._path.open("ab") as f:
            f.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Bring the file to disk. Every tensor must have been written."""
        assert not self._expected, f"{self._path}: {[spec.name for spec in self._expected]} not written"
        sync(self._path)


def write_companions(source: Path, config: dict[str, object], tensors: list[TensorSpec], out: Path) -> None:
    """Tokenizer, generation settings, and config.json with the dtype most of the weights have, unquantised."""
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, name) for name in COMPANIONS):
            shutil.copyfile(file, out / file.name)
    by_dtype: dict[torch.dtype, int] = {}
    for spec in tensors:
        by_dtype[spec.dtype] = by_dtype.get(spec.dtype, 0) + spec.nbytes
    main = max(by_dtype, key=lambda dtype: by_dtype[dtype])
    dropped = ("torch_dtype", "quantization_config")  # the old name of `dtype`; weights are written unquantised
    recorded = {key: value for key, value in config.items() if key not in dropped}
    write_json(out / "config.json", {**recorded, "dtype": str(main).removeprefix("torch.")})


def _put_in_place(unfinished: Path, out: Path) -> None:
    for file in unfinished.iterdir():
        sync(file)
    if out.exists():
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        unfinished.rename(out)
        shutil.rmtree(old)
    else:
        unfinished.rename(out)
    sync(out.parent)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
