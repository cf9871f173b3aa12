"""Reads boxes of tensors out of an HF directory's safetensors, one file or an index of shards, without whole tensors.

Used by the learner, by the embedded server and by whatever converts. Every error names the file and the tensor. Knows
nothing of models.
"""

from __future__ import annotations

import json
from functools import cached_property
from math import prod
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megasapo.families.weights import Box, BridgeError, Shape, full_box

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_OPEN = 2  # files
MOST_MAPPED = 64 << 20  # bytes of them
FLOATS = ("F64", "F32", "F16", "BF16")
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Entry(NamedTuple):
    shape: Shape
    dtype: str


class TensorSpec(NamedTuple):
    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def cast(self, dtype: torch.dtype | None) -> TensorSpec:
        """In another dtype; None: as it is."""
        return self if dtype is None else self._replace(dtype=dtype)


class HFFiles:
    """The tensors of an HF directory by name. `bytes_read` counts what `read` has returned."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.bytes_read = 0
        self._headers: dict[str, dict[str, Entry]] = {}
        self._handles: dict[str, Any] = {}
        self._mapped = 0
        self._file_of = self._locate()

    @property
    def names(self) -> list[str]:
        """Of all tensors, file by file."""
        return list(self._file_of)

    def file(self, name: str) -> Path:
        """The file that holds (or, by the index, should hold) a tensor."""
        return self.directory / self._file_of[name]

    def entry(self, name: str) -> Entry:
        """Shape and dtype. Raises BridgeError when the file is missing, broken, or lacks the tensor."""
        header = self._header(self._file_of[name], wanted=name)
        if name not in header:
            raise BridgeError(f"{self.file(name)}: has no tensor {name!r}, though {INDEX} says so")
        return header[name]

    def spec(self, name: str) -> TensorSpec:
        """The same, of a tensor that is copied as it is: BridgeError for a dtype that cannot be written again."""
        shape, dtype = self.entry(name)
        if dtype not in DTYPES:
            raise BridgeError(f"{self.file(name)}: tensor {name!r} has dtype {dtype}: known are {', '.join(DTYPES)}")
        return TensorSpec(name, shape, DTYPES[dtype])

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """Those of all tensors, file by file."""
        return [self.spec(name) for name in self.names]

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A copy of one box of a tensor, or of all of it, in the file's dtype."""
        box = box or full_box(self.entry(name).shape)
        file = self._file_of[name]
        try:
            full = self._open(file).get_slice(name)
            value: torch.Tensor = full[tuple(slice(start, stop) for start, stop in box)]
        except (SafetensorError, OSError) as e:
            raise BridgeError(f"{self.file(name)}: cannot read tensor {name!r}: {e}") from e
        self.bytes_read += value.nbytes
        self._mapped += prod(full.get_shape()) * value.element_size()  # pages of all rows, whatever the box's columns
        return value

    def _open(self, file: str) -> Any:
        """Mapped into memory, where what has been read of it stays until it is closed: so little at a time."""
        if self._mapped > MOST_MAPPED:
            self._handles.clear()
            self._mapped = 0
        if file not in self._handles:
            while len(self._handles) >= MOST_OPEN:
                self._handles.pop(next(iter(self._handles)))
            self._handles[file] = safe_open(self.directory / file, "pt")
        return self._handles[file]

    def _locate(self) -> dict[str, str]:
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(self._header(SINGLE, wanted=None), SINGLE)
        path = self.directory / INDEX
        if not path.is_file():
            raise BridgeError(f"{self.directory}: no such weights: has neither {SINGLE} nor {INDEX}")
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as e:
            raise BridgeError(f"{path}: not an index of safetensors files: {e!r}") from e
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise BridgeError(
                f"{path}: not an index of safetensors files: its weight_map names no file for each tensor"
            )
        return dict(sorted(weight_map.items(), key=lambda item: item[1]))

    def _header(self, file: str, wanted: str | None) -> dict[str, Entry]:
        if file not in self._headers:
            self._headers[file] = _read_header(self.directory / file, wanted)
            stray = [n for n in self._headers[file] if wanted is not None and self._file_of.get(n) != file]
            if stray:
                raise BridgeError(f"{self.directory / file}: holds {stray[0]!r}, which {INDEX} does not place there")
        return self._headers[file]


def has_weights(directory: Path) -> bool:
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file()


def _read_header(path: Path, wanted: str | None) -> dict[str, Entry]:
    """Names, shapes and dtypes of a safetensors file; checks that all of its data is there."""
    asked = f" (needed for tensor {wanted!r})" if wanted else ""
    if not path.is_file():
        raise BridgeError(f"{path}: no such file{asked}")
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise BridgeError(f"{path}: truncated inside its header, {size} bytes{asked}")
        try:
            header = json.loads(f.read(length))
        except ValueError as e:
            raise BridgeError(f"{path}: not a safetensors file{asked}: {e}") from e
    if not isinstance(header, dict):
        raise BridgeError(f"{path}: not a safetensors file{asked}: its header is {str(header)[:100]}")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    ends: dict[str, int] = {}
    for name, info in header.items():
        try:
            entries[name] = Entry(tuple(map(index, info["shape"])), str(info["dtype"]))
            ends[name] = 8 + length + index(info["data_offsets"][1])
        except (KeyError, IndexError, TypeError) as e:
            raise BridgeError(f"{path}: tensor {name!r} has a broken entry in the header: {str(info)[:200]}") from e
    for name in sorted(ends, key=lambda name: ends[name]):
        if ends[name] > size:
            raise BridgeError(f"{path}: truncated: tensor {name!r} ends at byte {ends[name]}, the file has {size}")
    return entries
