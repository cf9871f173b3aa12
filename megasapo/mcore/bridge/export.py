"""A megatron-core model spread over ranks -> full HF-named tensors on rank 0, in bounded buckets.

Called by save.py and by whoever publishes weights. Rank 0 learns once who holds which box of which tensor and tells all
ranks the buckets; each bucket is then one batch of point-to-point sends straight into the full tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import nn

from megasapo.families.weights import Box, BridgeError, Piece, Shape
from megasapo.hf_files import TensorSpec
from megasapo.mcore.bridge.placement import Locals, as_stored, place
from megasapo.mcore.topology import Topology

NamedTensors = list[tuple[str, torch.Tensor]]
T = TypeVar("T")


class _Offer(NamedTuple):
    """What one rank says about the boxes of one HF tensor that it will send."""

    order: tuple[int, ...]
    spec: TensorSpec
    boxes: tuple[Box, ...]


def export_hf(
    chunks: Sequence[nn.Module], hf_config: Any, topo: Topology, *, bucket_bytes: int
) -> Iterator[NamedTensors]:
    """Stream the model in HF form. Collective: every rank iterates to the end.

    Rank 0 gets lists of (HF name, full tensor) on the model's device, in the order of an HF state dict; other ranks
    get as many empty lists. A list takes at most `bucket_bytes`, receive buffers included; a tensor that needs more
    comes alone. Each list is emptied when the next one is asked for, so that only one is ever alive.
    """
    yield from Export(chunks, hf_config, topo).buckets(bucket_bytes)


class Export:
    """One export, planned: which tensors there are is known before any is moved. Making one is collective."""

    def __init__(self, chunks: Sequence[nn.Module], hf_config: Any, topo: Topology) -> None:
        self._topo = topo
        self._device = next(p.device for chunk in chunks for p in chunk.parameters())
        offers, self._sends = _offers(place(chunks, hf_config))
        gathered: list[list[_Offer]] | None = [[]] * topo.world_size if topo.rank == 0 else None
        dist.gather_object(offers, gathered, dst=0, group=topo.world_group_cpu)
        self._sources: dict[str, list[tuple[int, Box]]] = {}  # on rank 0: who sends which box of a tensor, in order
        self.tensors: list[TensorSpec] = []
        """All tensors in order; on rank 0 only."""
        if gathered is not None:
            self.tensors, self._sources = _combine(gathered)
        self._specs = {spec.name: spec for spec in self.tensors}

    def buckets(self, bucket_bytes: int) -> Iterator[NamedTensors]:
        """See export_hf."""
        plan = [self._plan(bucket_bytes) if self._topo.rank == 0 else []]
        dist.broadcast_object_list(plan, src=0, group=self._topo.world_group_cpu)
        if self._topo.world_size > 1:
            # NCCL: a batch of sends between a few ranks must not be the group's first communication
            dist.all_reduce(torch.zeros(1, device=self._device))
        for names in plan[0]:
            bucket = self._gather(names) if self._topo.rank == 0 else self._send(names)
            yield bucket
            bucket.clear()

    def _plan(self, bucket_bytes: int) -> list[list[str]]:
        """Names by bucket."""
        plan = split_by_bytes(self.tensors, lambda spec: spec.nbytes + self._staged_bytes(spec), bucket_bytes)
        return [[spec.name for spec in bucket] for bucket in plan]

    def _staged_bytes(self, spec: TensorSpec) -> int:
        """Bytes that cannot be received in place, because they are not contiguous in the full tensor."""
        boxes = [box for rank, box in self._sources[spec.name] if rank != 0 and not _is_contiguous(box, spec.shape)]
        return sum(_volume(box) for box in boxes) * spec.dtype.itemsize

    @torch.no_grad()
    def _send(self, names: Iterable[str]) -> NamedTensors:
        ops = [
            dist.P2POp(dist.isend, _part(tensor, piece).contiguous(), 0)
            for name in names
            for tensor, piece in self._sends.get(name, [])
        ]
        _run(ops)
        return []

    @torch.no_grad()
    def _gather(self, names: Iterable[str]) -> NamedTensors:
        bucket: NamedTensors = []
        ops: list[dist.P2POp] = []
        staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name in names:
            spec = self._specs[name]
            full = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
            for tensor, piece in self._sends.get(name, []):
                copy_out(tensor, piece, full)
            for rank, box in self._sources[name]:
                if rank != 0:
                    target = _at(full, box)
                    landing = target if target.is_contiguous() else torch.empty_like(target).contiguous()
                    ops.append(dist.P2POp(dist.irecv, landing, rank))
                    if landing is not target:
                        staged.append((target, landing))
            bucket.append((name, full))
        _run(ops)
        for target, landing in staged:
            target.copy_(landing)
        return bucket


# local tensor, and which piece of it
_Sends = dict[str, list[tuple[torch.Tensor, Piece]]]


def _offers(mine: Locals) -> tuple[list[_Offer], _Sends]:
    """What this rank speaks for: descriptions for rank 0, and the views to send."""
    offers: list[_Offer] = []
    sends: _Sends = defaultdict(list)
    for placed in mine.placed:
        if not placed.is_primary:
            continue
        boxes: dict[int, list[Box]] = defaultdict(list)
        for piece in placed.pieces:
            boxes[piece.source].append(piece.hf)
            sends[placed.names[piece.source]].append((placed.tensor.detach(), piece))
        for source, held in boxes.items():
            spec = TensorSpec(placed.names[source], placed.shapes[source], placed.tensor.dtype)
            offers.append(_Offer((*placed.order, source), spec, tuple(held)))
    return offers, dict(sends)


def _combine(gathered: list[list[_Offer]]) -> tuple[list[TensorSpec], dict[str, list[tuple[int, Box]]]]:
    """All ranks' offers put together. Raises BridgeError unless the boxes of every tensor cover it exactly once."""
    ordered: dict[str, tuple[tuple[int, ...], TensorSpec]] = {}
    sources: dict[str, list[tuple[int, Box]]] = defaultdict(list)
    for rank, offers in enumerate(gathered):
        for offer in offers:
            name = offer.spec.name
            _, spec = ordered.setdefault(name, (offer.order, offer.spec))
            if spec != offer.spec:
                raise BridgeError(f"{name}: rank {rank} holds a part of {offer.spec}, another rank of {spec}")
            sources[name] += [(rank, box) for box in offer.boxes]
    for _, spec in ordered.values():
        boxes = [box for _, box in sources[spec.name]]
        if sum(map(_volume, boxes)) != prod(spec.shape) or len(set(boxes)) != len(boxes):
            raise BridgeError(f"{spec.name}: the ranks' parts {sources[spec.name]} do not make up {list(spec.shape)}")
    return [spec for _, spec in sorted(ordered.values(), key=lambda item: item[0])], dict(sources)


def split_by_bytes(items: Iterable[T], nbytes: Callable[[T], int], most: int) -> list[list[T]]:
    """Consecutive items in as few groups of at most so many bytes as can be; one that has more is alone."""
    groups: list[list[T]] = []
    filled = 0
    for item in items:
        if not groups or filled + nbytes(item) > most:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += nbytes(item)
    return groups


def _run(ops: list[dist.P2POp]) -> None:
    if ops:
        for work in dist.batch_isend_irecv(ops):
            work.wait()


def copy_out(tensor: torch.Tensor, piece: Piece, full: torch.Tensor) -> None:
    """A piece of a local tensor into the box of the HF tensor that it is."""
    part = _part(tensor, piece)
    _at(full, piece.hf).view(part.shape).copy_(part)


def _at(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in box)]


def _part(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A piece of a parameter in HF's order, as numbers where Transformer Engine keeps it in FP8."""
    return as_stored(_at(dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor, piece.local), piece)


def _volume(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def _is_contiguous(box: Box, shape: Shape) -> bool:
    """Whether a box is one run of memory: after its first dimension longer than one, everything is whole."""
    lengths = [stop - start for start, stop in box]
    first = next((i for i, n in enumerate(lengths) if n > 1), len(lengths))
    return all(n == full for n, full in zip(lengths[first + 1 :], shape[first + 1 :], strict=True))
