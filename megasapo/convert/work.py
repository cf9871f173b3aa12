"""What a conversion writes: the files it is made of, each from its source on its own, in any order and any process.

`make_work` checks all that can be known before a byte is written. Called by command.py and its processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch

from megasapo import __version__, checkpoints
from megasapo.convert.errors import WriteError, writing
from megasapo.convert.job import Folder, Output
from megasapo.convert.sources import MegatronSource, Source
from megasapo.families.mtp import exported_config, mtp_names
from megasapo.fp8.blocks import SCALE, WEIGHT_BLOCK
from megasapo.geometry import read_config
from megasapo.hf_files import INDEX, TensorSpec
from megasapo.layout import fewest_ranks
from megasapo.mcore.blueprint import Stored, blueprint
from megasapo.mcore.bridge.dequantised import DequantisedFiles
from megasapo.mcore.bridge.export import split_by_bytes
from megasapo.mcore.bridge.load import check_files, fill, refuse_other_head
from megasapo.mcore.bridge.placement import Placed, as_it_is, keeps_dtype
from megasapo.mcore.bridge.save import (
    Carried,
    SafetensorsWriter,
    assign_files,
    say_mtp,
    write_companions,
    write_json,
    write_weight_map,
)
from megasapo.mcore.torch_dist import Piece, Place, write_index, write_piece
from megasapo.rollout.quantise import is_quantised, quantise_bucket, quantised_config
from megasapo.sections import ParallelConfig

Direction = Literal["hf-to-megatron", "megatron-to-hf", "hf-to-hf"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted. It goes to other processes, and into the identity of a conversion."""

    direction: Direction
    source: Path
    model: Path  # the HF directory with config.json and tokenizer; of an HF source itself
    shard_bytes: int
    dtype: str | None = None  # None: as the source has it, FP8 as bfloat16
    quantise: bool = False
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def cast(self) -> torch.dtype | None:
        return None if self.dtype is None else DTYPES[self.dtype]

    @property
    def fp8_as(self) -> torch.dtype:
        return self.cast or torch.bfloat16

    def identity(self) -> dict[str, Any]:
        said = {
            name: str(getattr(self, name)) for name in ("direction", "shard_bytes", "dtype", "quantise", "parallel")
        }
        places = {name: str(getattr(self, name).resolve()) for name in ("source", "model")}
        return {"version": __version__, **said, **places}


def make_work(request: Request) -> Work:
    match request.direction:
        case "hf-to-megatron":
            return ToMegatron(request)
        case "megatron-to-hf":
            return ToHF(request, megatron_source(request))
        case "hf-to-hf":
            source = DequantisedFiles(request.source, request.fp8_as)
            whole = blueprint(request.model, ParallelConfig()).locals[0]
            check_files(whole, source)
            refuse_other_head(whole, source)
            return ToHF(request, source)


def megatron_source(request: Request) -> MegatronSource:
    """That of megatron-to-hf. A run's checkpoint has no layers for multi-token prediction: its model's files may."""
    beside = Carried(request.model, read_config(request.model), request.fp8_as)
    return MegatronSource(request.source, request.model, beside)


class ToMegatron:
    """HF tensors -> pieces of a megatron-core checkpoint as the ranks of a layout would store them."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._files = DequantisedFiles(request.source, request.fp8_as)
        self._config = read_config(request.model)
        self._mtp = mtp_names(self._config, self._files.names)
        plan = blueprint(request.model, request.parallel)
        for mine in plan.locals:
            check_files(mine, self._files)
        refuse_other_head(plan.locals[0], self._files)
        self._stored: dict[str, list[Stored]] = {}
        self.outputs = []
        stored = [*plan.stored, *map(self._as_it_is, self._mtp)]
        for i, group in enumerate(split_by_bytes(stored, self._nbytes, request.shard_bytes)):
            name = f"__{i}_0.distcp"
            self._stored[name] = group
            self.outputs.append(Output(name, sum(map(self._nbytes, group))))
        self._last: tuple[Placed, torch.Tensor] | None = None

    def write(self, output: Output, folder: Folder) -> None:
        """Write one file in full and record it. Raises WriteError when the disk is full."""
        stored = self._stored[output.name]
        one, places = stored[0], []
        try:
            with folder.unfinished(output.name).open("wb") as file:
                for one in stored:
                    places.append(write_piece(file, self._numbers(one)))
            folder.finish(output.name, places)
        except OSError as e:
            raise WriteError(f"{folder.files / output.name}: cannot write tensor {one.key!r}: {e.strerror}") from e

    def complete(self, folder: Folder) -> None:
        """Once all files are there: what makes them a checkpoint."""
        told: list[tuple[Piece, Place]] = []
        files: dict[str, str] = {}
        for output in self.outputs:
            finished = folder.told(output.name)
            pieces = [self._piece(one) for one in self._stored[output.name]]
            places = [Place(output.name, *place) for place in finished["contents"]]
            told += zip(pieces, places, strict=True)
            files[output.name] = finished["sha256"]
        with writing(folder.files / ".metadata"):
            write_index(folder.files, told)
        others = [path for path in folder.files.iterdir() if path.name not in files]
        files |= zip([path.name for path in others], checkpoints.sha256(others), strict=True)
        specs = [TensorSpec(piece.key, piece.shape, piece.dtype) for piece, _ in told]
        with writing(folder.files / "config.json"):
            write_companions(self._request.model, exported_config(self._config, self._mtp), specs, folder.files)
        degrees = self._request.parallel.model_dump()
        record = {
            "format": checkpoints.FORMAT,
            "step": 0,
            "world_size": fewest_ranks(self._request.parallel),
            "layout": {"world_size": fewest_ranks(self._request.parallel), **degrees},
            "converted": {"from": str(self._request.source), "version": __version__},
            "trainer": {},
            "files": files,
        }
        with writing(folder.files / checkpoints.RECORD):
            checkpoints.write_record(folder.files, record)

    def _numbers(self, one: Stored) -> torch.Tensor:
        """The pieces of one weight follow one another, and it is read once."""
        if self._last is None or self._last[0] is not one.placed:
            self._last = None  # before the next is made
            weight = torch.empty(one.placed.tensor.shape, dtype=self._dtype(one))
            fill(one.placed._replace(tensor=weight), self._files)
            self._last = one.placed, weight
        return one.of(self._last[1])

    def _as_it_is(self, name: str) -> Stored:
        """A tensor that megatron-core has no name for, under its own."""
        shape = self._files.spec(name).shape
        placed = as_it_is(name, shape, self._config)
        return Stored(name, (0,) * len(shape), shape, shape, False, placed, (shape, placed.tensor.stride(), 0))

    def _dtype(self, one: Stored) -> torch.dtype:
        """Of the source, unless another was asked for."""
        if self._request.cast is not None and not one.placed.keeps_dtype:
            return self._request.cast
        return reduce(torch.promote_types, (self._files.spec(name).dtype for name in one.placed.names))

    def _piece(self, one: Stored) -> Piece:
        return Piece(one.key, one.offset, one.shape, one.global_shape, self._dtype(one))

    def _nbytes(self, one: Stored) -> int:
        return TensorSpec(one.key, one.shape, self._dtype(one)).nbytes


class ToHF:
    """HF-named tensors of any source -> safetensors with an index."""

    def __init__(self, request: Request, source: Source) -> None:
        self._request, self._source = request, source
        self._config = exported_config(read_config(request.model), [spec.name for spec in source.specs])
        if request.quantise:
            unquantised = {k: v for k, v in self._config.items() if k != "quantization_config"}
            told = quantised_config(unquantised, request.model)
            self._quantisation = {"quantization_config": told["quantization_config"]}
        self.specs = [s if keeps_dtype(self._config, s.name) else s.cast(request.cast) for s in source.specs]
        """Every tensor as it is cast, before it is quantised."""
        written = [part for spec in self.specs for part in self._written(spec)]
        self._files = assign_files(written, request.shard_bytes)
        self.outputs = [Output(name, sum(s.nbytes for s in specs)) for name, specs in self._files.items()]

    def write(self, output: Output, folder: Folder) -> None:
        """Write one file in full and record it. Raises WriteError when the disk is full."""
        specs = self._files[output.name]
        name = specs[0].name
        try:
            writer = SafetensorsWriter(folder.unfinished(output.name), specs)
            for name, tensor in self._tensors({spec.name for spec in specs}):
                writer.write(name, tensor)
                del tensor  # before the next is made
            writer.finish()
            folder.finish(output.name, None)
        except OSError as e:
            raise WriteError(f"{folder.files / output.name}: cannot write tensor {name!r}: {e.strerror}") from e

    def complete(self, folder: Folder) -> None:
        """Once all files are there: what makes them an HF directory."""
        with writing(folder.files / INDEX):
            write_weight_map(folder.files, self._files)
        with writing(folder.files / "config.json"):
            self._write_companions(folder.files)
        if self._request.direction == "megatron-to-hf":
            say_mtp(self._request.model, [spec.name for spec in self.specs])

    def _write_companions(self, directory: Path) -> None:
        write_companions(self._request.model, self._config, self.specs, directory)
        if self._request.quantise:
            said = read_config(directory)  # with the dtype of what is not quantised
            write_json(directory / "config.json", said | self._quantisation)

    def converted(self, spec: TensorSpec) -> list[tuple[str, torch.Tensor]]:
        """A tensor of the source as it is written: cast, and quantised with its scales."""
        tensor = self._source.read(spec.name).to(spec.dtype)
        return quantise_bucket([(spec.name, tensor)]) if self._request.quantise else [(spec.name, tensor)]

    def _tensors(self, wanted: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """In the order of the specs. A matrix and its scales may be in two files: it is quantised for both."""
        for spec in self.specs:
            if wanted & {part.name for part in self._written(spec)}:
                yield from (part for part in self.converted(spec) if part[0] in wanted)

    def _written(self, spec: TensorSpec) -> list[TensorSpec]:
        if not self._request.quantise or not is_quantised(spec.name, len(spec.shape)):
            return [spec]
        blocks = tuple(-(-n // b) for n, b in zip(spec.shape, WEIGHT_BLOCK, strict=True))
        return [
            spec._replace(dtype=torch.float8_e4m3fn),
            TensorSpec(spec.name + SCALE, blocks, torch.float32),
        ]


Work = ToMegatron | ToHF
