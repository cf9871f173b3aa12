"""Where every weight of a model lies in a megatron-core checkpoint, in any layout, found without ranks or memory.

Called by megasapo/convert. Each rank of the layout is imagined in turn: process groups of torch's fake backend, which
send nothing, and the model on the meta device; what megatron-core would save of it says keys, shapes and offsets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch.overrides import TorchFunctionMode

from megasapo.layout import fewest_ranks
from megasapo.mcore import model
from megasapo.mcore.bridge.placement import Locals, Placed, place
from megasapo.mcore.topology import Topology, imagined
from megasapo.sections import ModelConfig, ParallelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """One piece of a tensor in a checkpoint, and the view of the local weight whose numbers it has."""

    key: str
    offset: Shape
    shape: Shape  # as stored: axes before the weight's own (layer, expert) have length one
    global_shape: Shape
    may_be_padded: bool  # megatron-core pads the vocabulary as the layout needs it: a loader takes what there is
    placed: Placed
    view: tuple[Shape, Shape, int]  # size, strides and offset within the local weight

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """This piece of the local weight, in the stored shape; both share their memory."""
        return weight.as_strided(*self.view).view(self.shape)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """All pieces that the ranks of a layout would store, each once, in the order of an HF state dict."""

    locals: list[Locals]  # of each rank
    stored: list[Stored]


def blueprint(hf_dir: str | Path, parallel: ParallelConfig) -> Blueprint:
    """That of an HF directory's config.json, at a layout that megasapo.layout has checked.

    Weights that megatron-core keeps in fp32 whatever the model's dtype are float32 in it, all others bfloat16. There
    must be no process group. Raises BridgeError and ConfigError for a model without a weight table.
    """
    hf_config = model.read_hf_config(hf_dir)
    cfg = ModelConfig(path=str(hf_dir), dtype="bfloat16")
    everyone: list[Locals] = []
    stored: dict[tuple[str, Shape], Stored] = {}
    for rank in range(fewest_ranks(parallel.model_copy(update={"cp": 1}))):
        with imagined(parallel, rank) as topo, _on_meta():
            chunks = model.build_model(cfg, hf_config, cast(Topology, topo))
            mine = place(chunks, hf_config)
            everyone.append(mine)
            for piece in _pieces(chunks, mine):
                stored.setdefault((piece.key, piece.offset), piece)
    ordered = sorted(stored.values(), key=lambda piece: (piece.placed.order, piece.key, piece.offset))
    return Blueprint(everyone, ordered)


def _pieces(chunks: list[torch.nn.Module], mine: Locals) -> Iterator[Stored]:
    by_memory = {_memory(placed.tensor): placed for placed in mine.placed}
    for chunk in cast(list[Any], chunks):
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for piece in nested_values(state):
            if not isinstance(piece, ShardedTensor):
                continue  # Transformer Engine's scales, which a loader does without
            data = piece.data
            placed = by_memory[_memory(data)]
            shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
            view = (tuple(data.shape), data.stride(), data.storage_offset() - placed.tensor.storage_offset())
            yield Stored(
                piece.key,
                tuple(piece.global_offset),
                shape,
                tuple(piece.global_shape),
                bool(piece.allow_shape_mismatch),
                placed,
                view,
            )


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # tells meta tensors apart, which have no address


@contextmanager
def _on_meta() -> Iterator[None]:
    """Whatever is made inside takes no memory, also where megatron-core names the device."""
    assert not torch.cuda.is_available(), "a blueprint is made without GPUs, which other layers are chosen for"
    with torch.device("meta"), _Redirect(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what megatron-core says of ranks, a run will say
        yield


class _Redirect(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
