"""The files of a megatron-core checkpoint (torch's distributed format), piece by piece, without ranks or a model.

Called by megasapo/convert, for which megatron-core's own save and load would hold everything at once. `StoredTensors`
reads boxes of tensors by key, `write_piece` and `write_index` write what dist_checkpointing.load reads.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what an index is made of: torch has no public name
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megasapo.errors import UserError
from megasapo.families.weights import Shape
from megasapo.mcore.slices import make_up


class StoredError(UserError, RuntimeError):
    """A checkpoint's file is missing, cut short or damaged, or lacks a tensor; the message names both."""


class Piece(NamedTuple):
    """A part of a tensor as it lies in a file."""

    key: str
    offset: Shape
    shape: Shape
    global_shape: Shape
    dtype: torch.dtype


class Place(NamedTuple):
    """Where the bytes of a piece are."""

    file: str
    start: int
    length: int


class StoredTensors:
    """Tensors of a checkpoint's directory by key; only the pieces that overlap what is asked for are read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._whole: set[str] = set()  # those whose parts have been looked at
        try:
            index = FileSystemReader(directory).read_metadata()
            found = index.state_dict_metadata.items()
            self.tensors = {key: value for key, value in found if isinstance(value, TensorStorageMetadata)}
            self._shapes: dict[str, dict[Shape, Shape]] = {  # of each tensor's pieces, by offset
                key: {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in value.chunks}
                for key, value in self.tensors.items()
            }
            self._places: dict[tuple[str, Shape], Place] = {
                (entry.fqn, tuple(entry.offset or ())): Place(info.relative_path, info.offset, info.length)
                for entry, info in index.storage_data.items()
                if entry.fqn in self.tensors
            }
        except Exception as e:  # damaged pickles fail in many ways
            raise StoredError(f"{directory / '.metadata'}: cannot read the checkpoint's index: {e!r}") from e

    def shape(self, key: str) -> Shape:
        """The whole tensor's. Raises StoredError when there is none of that key."""
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        dtype: torch.dtype = self._tensor(key).properties.dtype
        return dtype

    def file(self, key: str) -> Path:
        """One of the files that hold a tensor."""
        return self.directory / self._places[key, next(iter(self._shapes[key]))].file

    def pieces(self, key: str) -> list[tuple[Shape, Shape]]:
        """Offset and shape of each stored piece."""
        return list(self._shapes[key].items())

    @torch.no_grad()
    def read(self, key: str, offset: Shape, into: torch.Tensor) -> None:
        """Copy the box at `offset` of the tensor into `into`, of the box's shape; what lies outside is left alone."""
        self._tensor(key)
        shape = tuple(into.shape)
        pieces = self._shapes[key]
        for start, length in [(offset, shape)] if pieces.get(offset) == shape else pieces.items():
            low = tuple(map(max, offset, start))
            high = tuple(min(o + n, s + m) for o, n, s, m in zip(offset, shape, start, length, strict=True))
            if all(a < b for a, b in zip(low, high, strict=True)):
                piece = self._load(key, start)
                into[_slices(low, high, offset)].copy_(piece[_slices(low, high, start)])

    def _tensor(self, key: str) -> TensorStorageMetadata:
        if key not in self.tensors:
            raise StoredError(f"{self.directory}: the checkpoint has no tensor {key!r}")
        if key not in self._whole:  # what is in no part would be whatever memory held before
            if not make_up(self.tensors[key].size, self.tensors[key].chunks):
                raise StoredError(
                    f"{self.directory / '.metadata'}: the parts of {key!r} do not make up the whole tensor"
                )
            self._whole.add(key)
        return self.tensors[key]

    def _load(self, key: str, offset: Shape) -> torch.Tensor:
        place = self._places.get((key, offset))
        if place is None:
            raise StoredError(f"{self.directory / '.metadata'}: does not say where {key!r} at {list(offset)} is")
        path = self.directory / place.file
        try:
            with path.open("rb") as f:
                f.seek(place.start)
                encoded = f.read(place.length)
        except OSError as e:
            raise StoredError(f"{path}: cannot read tensor {key!r}: {e.strerror}") from e
        if len(encoded) < place.length:
            raise StoredError(
                f"{path}: truncated: tensor {key!r} ends at byte {place.start + place.length}, the file has "
                f"{place.start + len(encoded)}: take another copy of the checkpoint"
            )
        try:
            piece: torch.Tensor = torch.load(io.BytesIO(encoded), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as e:
            raise StoredError(f"{path}: tensor {key!r} is damaged: {e}: take another copy of the checkpoint") from e
        if tuple(piece.shape) != self._shapes[key][offset]:
            raise StoredError(f"{path}: tensor {key!r} has shape {list(piece.shape)}, and another in .metadata")
        return piece


def write_piece(file: BinaryIO, tensor: torch.Tensor) -> tuple[int, int]:
    """Append a piece; where it begins and how long it is. OSError on a full disk."""
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes all that a view is part of
    encoded = io.BytesIO()  # torch.save straight into a file says RuntimeError where a disk is full
    torch.save(tensor, encoded)
    start = file.tell()
    file.write(encoded.getbuffer())
    return start, len(encoded.getbuffer())


def write_index(directory: Path, stored: Iterable[tuple[Piece, Place]]) -> None:
    """Make a directory of such files a checkpoint that megatron-core loads."""
    tensors: dict[str, TensorStorageMetadata] = {}
    results: list[WriteResult] = []
    for piece, place in stored:
        tensor = tensors.setdefault(
            piece.key, TensorStorageMetadata(TensorProperties(piece.dtype), torch.Size(piece.global_shape), [])
        )
        offset = torch.Size(piece.offset)
        tensor.chunks.append(ChunkStorageMetadata(offset, torch.Size(piece.shape)))
        index = MetadataIndex(piece.key, offset)
        results.append(WriteResult(index, place.length, _StorageInfo(place.file, place.start, place.length)))
    FileSystemWriter(directory).finish(Metadata(dict(tensors)), [results])
    nothing = io.BytesIO()  # and not straight into a file, as above
    torch.save({}, nothing)
    (directory / "common.pt").write_bytes(nothing.getvalue())  # megatron-core's place for what is no tensor
    save_config(CheckpointingConfig("torch_dist"), str(directory))


def _slices(low: Shape, high: Shape, origin: Shape) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
