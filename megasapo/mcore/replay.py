"""The experts that a model's routers choose: recorded in one forward pass, forced in another and its recomputation.

policy.py makes a RoutingReplay for its model, and step.py runs the forward of every chunk inside `record` or `replay`.
A routing holds this rank's own tokens and layers, in the order in which they go through the model, so nothing is sent
anywhere. It knows nothing of losses, schedules or process groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megasapo.config import ConfigError
from megasapo.mcore.model import unwrapped
from megasapo.routing.validate import storage_dtype
from megasapo.types import MicroBatch


class RoutingReplay:
    """Records and forces the routing of one model's chunks on this rank.

    A routing is [Tl, L, K]: this rank's tokens of a micro-batch, the MoE layers of all its chunks in order, K expert
    ids each, uint8 or int16; UNKNOWN in all K places leaves a token to the router. Gate probabilities are still
    computed from the router's logits at the forced experts, so gradients reach the router.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        """`chunks`: the model, wrapped for training or not; each model can have one RoutingReplay.

        ConfigError for a model whose routing cannot be replayed.
        """
        models: list[nn.Module] = [unwrapped(chunk) for chunk in chunks]
        config: Any = models[0].config
        _check_config(config)
        self.num_experts, self.top_k = int(config.num_moe_experts), int(config.moe_router_topk)
        self._layers = {model: _install(model) for model in models}
        self._recorded: dict[nn.Module, list[Tensor]] = {model: [] for model in models}
        self._given_up: dict[nn.Module, list[Tensor]] = {model: [] for model in models}
        self._between = _Mode.NATIVE  # what routers do outside record() and replay()

    @property
    def layers(self) -> tuple[int, ...]:
        """Which decoder layer of the whole model, from 0, each of the L columns belongs to."""
        return tuple(layer.index for own in self._layers.values() for layer in own)

    @contextmanager
    def record(self, chunk: nn.Module, mb: MicroBatch) -> Iterator[None]:
        """Keep what the routers of `chunk` choose in the forward of `mb` inside; `take` hands it out."""
        model = self._known(chunk)
        layers = self._layers[model]
        with _forward(layers, _Mode.RECORD, afterwards=self._between):
            yield
        self._recorded[model].append(self._choices(layers, mb))

    @contextmanager
    def compare(self, chunk: nn.Module, mb: MicroBatch) -> Iterator[None]:
        """As `replay`, without gradients, and keep what each router would have chosen at the inputs it was given.

        `take` hands out those choices: every layer before the router was forced, so where they differ from
        `mb.routing` that very layer decided otherwise. `take_given_up` says by how much.
        """
        assert not torch.is_grad_enabled(), "compare is for scoring: what would have been chosen has no gradient"
        model = self._known(chunk)
        layers = self._layers[model]
        for layer, target in zip(layers, self._targets(model, mb), strict=True):
            layer.target, layer.expects_backward = target, False
        with _forward(layers, _Mode.COMPARE, afterwards=self._between):
            yield
        self._recorded[model].append(self._choices(layers, mb))
        given_up = torch.empty(mb.loss_mask.numel(), len(layers), device=mb.loss_mask.device)
        for column, layer in enumerate(layers):
            given_up[:, column] = layer.given_up
        self._given_up[model].append(given_up)

    def _choices(self, layers: list[_Layer], mb: MicroBatch) -> Tensor:
        """[Tl, L of the chunk, K] what its routers chose in the forward that just ended."""
        rows = mb.loss_mask.numel()
        routing = torch.from_numpy(np.empty((rows, len(layers), self.top_k), storage_dtype(self.num_experts)))
        routing = routing.to(mb.loss_mask.device)
        for column, layer in enumerate(layers):
            chosen = layer.take_chosen()
            if chosen.shape != (rows, self.top_k):
                raise ValueError(
                    f"the router of layer {layer.index} chose {list(chosen.shape)} experts, but this rank has {rows} "
                    f"tokens of the micro-batch and top-k {self.top_k}"
                )
            routing[:, column] = chosen
        return routing

    def take(self) -> list[Tensor]:
        """The routing [Tl, L, K] of each micro-batch recorded since the last call, in the order they ran."""
        recorded, self._recorded = self._recorded, {model: [] for model in self._recorded}
        return _over_chunks(recorded)

    def take_given_up(self) -> list[Tensor]:
        """[Tl, L] float32 of each micro-batch that ran inside `compare` since the last call, in the order they ran.

        The scores of the K experts that the router would have chosen less those of the K that it was forced to, as its
        top-k compares them: 0 where the two are the same.
        """
        given_up, self._given_up = self._given_up, {model: [] for model in self._given_up}
        return _over_chunks(given_up)

    @contextmanager
    def replay(self, chunk: nn.Module, mb: MicroBatch) -> Iterator[None]:
        """Force `mb.routing` on the forward of `mb` through `chunk` inside, and on its recomputation in backward.

        With gradients only inside `step`. Micro-batches may go backward at any time, but through each chunk in the
        order in which they went forward. ValueError for a routing of another shape; ids are not looked at again.
        """
        if torch.is_grad_enabled() and self._between is not _Mode.RECOMPUTE:
            raise RuntimeError("replay with gradients belongs inside step(), which ends the recomputation")
        model = self._known(chunk)
        layers = self._layers[model]
        for layer, target in zip(layers, self._targets(model, mb), strict=True):
            layer.target = target
            layer.expects_backward = torch.is_grad_enabled()
        with _forward(layers, _Mode.REPLAY, afterwards=self._between):
            yield

    @contextmanager
    def step(self) -> Iterator[Callable[[nn.Module, MicroBatch], AbstractContextManager[None]]]:
        """Around all forward and backward passes that replay for one gradient; gives `replay`.

        Inside, nothing is routed natively; afterwards everything is.
        """
        layers = [layer for own in self._layers.values() for layer in own]
        self._between = _Mode.RECOMPUTE
        for layer in layers:
            layer.mode = self._between
        try:
            yield self.replay
            for layer in layers:
                if layer.pending:
                    raise RuntimeError(
                        f"layer {layer.index} was not routed again for {len(layer.pending)} micro-batches that were to "
                        "be recomputed: did their backward run inside step()?"
                    )
        finally:
            self._between = _Mode.NATIVE
            for layer in layers:
                layer.reset()

    def _known(self, chunk: nn.Module) -> nn.Module:
        model: nn.Module = unwrapped(chunk)
        if model not in self._layers:
            raise ValueError("this chunk is not of the model that the RoutingReplay was made for")
        return model

    def _targets(self, model: nn.Module, mb: MicroBatch) -> list[Tensor]:
        """Of each layer of a chunk, [Tl, K] from the micro-batch's routing."""
        if mb.routing is None:
            raise ValueError("the micro-batch has no routing to replay; record it when old_logp is computed")
        expected = (mb.loss_mask.numel(), len(self.layers), self.top_k)
        if mb.routing.shape != expected or mb.routing.dtype not in (torch.uint8, torch.int16):
            raise ValueError(
                f"routing of shape {list(mb.routing.shape)} and {mb.routing.dtype}: this rank has {expected[0]} tokens "
                f"of the micro-batch, {expected[1]} MoE layers and top-k {expected[2]}, as uint8 or int16"
            )
        start = 0
        for other, layers in self._layers.items():
            if other is model:
                break
            start += len(layers)
        return list(mb.routing[:, start : start + len(self._layers[model])].unbind(1))


def _over_chunks(parts: dict[nn.Module, list[Tensor]]) -> list[Tensor]:
    """Of each micro-batch, the columns of all chunks."""
    counts = {len(values) for values in parts.values()}
    assert len(counts) == 1, f"the chunks recorded different numbers of micro-batches: {counts}"
    return [torch.cat(columns, dim=1) for columns in zip(*parts.values(), strict=True)]


class _Mode(Enum):
    NATIVE = "the router chooses"
    RECORD = "the router chooses, and it is kept"
    REPLAY = "the target is forced"
    COMPARE = "the target is forced, and what the router would have chosen is kept"
    RECOMPUTE = "between forward passes: only backward asks, for what its forward was forced to"


class _Layer:
    """Stands where a router keeps megatron-core's RouterReplay, and answers the one question the router asks of it.

    RouterReplay itself (0.16.1 to 0.19.2) enters every instance into one list for all models of the process, queues
    each target for a recomputation whether or not one comes, cannot leave some tokens to the router, and records
    choices as top-k gives them, in 0.19 in no particular order without gradients: sums over them would differ.
    """

    def __init__(self, index: int) -> None:
        self.index = index  # of the decoder layer, from 0
        self.mode = _Mode.NATIVE
        self.asked = 0  # times in the current forward
        self.target: Tensor | None = None  # [Tl, K]
        self.expects_backward = False
        self.pending: deque[Tensor] = deque()  # targets of micro-batches whose backward will ask again, in order
        self._chosen: Tensor | None = None
        self.given_up = torch.empty(0)  # [Tl] in the last forward inside compare()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and ids [Tl, K] of the experts for scores [Tl, E]; megatron-core's name and arguments."""
        assert default_compute_topk is not None, "the router passes its own top-k"
        self.asked += 1
        if self.mode is _Mode.NATIVE:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        target = self._forced()
        own: Tensor | None = None
        if target is None or target.dtype is not torch.uint8 or self.mode is _Mode.COMPARE:  # int16 may hold UNKNOWN
            best, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            own = own.gather(1, best.detach().argsort(dim=1, descending=True, stable=True))
        if target is None or own is None:
            ids = own if target is None else target.long()
        else:
            ids = torch.where(target < 0, own, target.long())
        assert ids is not None
        if self.mode in (_Mode.RECORD, _Mode.COMPARE):
            self._chosen = own
        chosen = scores.gather(1, ids)
        if self.mode is _Mode.COMPARE:
            assert own is not None
            self.given_up = (scores.gather(1, own).sum(1) - chosen.sum(1)).float()
        return chosen, ids

    def _forced(self) -> Tensor | None:
        """[Tl, K] what to choose now, None while recording."""
        if self.mode is _Mode.RECORD:
            return None
        if self.mode in (_Mode.REPLAY, _Mode.COMPARE):
            assert self.target is not None
            # Activation checkpointing runs the forward of a training pass without gradients, and this layer again in
            # backward. A forward with gradients is the only one.
            if self.expects_backward and not torch.is_grad_enabled():
                self.pending.append(self.target)
            return self.target
        if not self.pending:
            raise RuntimeError(
                f"layer {self.index} was routed in backward without a recomputation being due: every forward inside "
                "step() must run inside replay()"
            )
        return self.pending.popleft()

    def take_chosen(self) -> Tensor:
        assert self._chosen is not None
        chosen, self._chosen = self._chosen, None
        return chosen

    def reset(self) -> None:
        self.mode, self.target, self._chosen = _Mode.NATIVE, None, None
        self.pending.clear()


@contextmanager
def _forward(layers: list[_Layer], mode: _Mode, *, afterwards: _Mode) -> Iterator[None]:
    for layer in layers:
        layer.mode, layer.asked = mode, 0
    try:
        yield
    finally:
        for layer in layers:
            layer.mode, layer.target = afterwards, None
    for layer in layers:
        if layer.asked != 1:
            raise RuntimeError(
                f"the router of layer {layer.index} took its experts from replay {layer.asked} times in one forward "
                "instead of once: replay works with top-k routing only, neither fused nor in a CUDA graph"
            )


def _check_config(config: Any) -> None:
    if not config.num_moe_experts:
        raise ConfigError("routing replay needs a model with experts, and this one has none: set routing_replay=none")
    refused = {
        "moe_router_fusion": "the fused router chooses by itself",
        "moe_enable_routing_replay": "megatron-core's own replay would take the place of ours",
        "overlap_moe_expert_parallel_comm": "forward and backward of different micro-batches run at once",
        "mtp_num_layers": "layers of multi-token prediction are not replayed",
    }
    for name, reason in refused.items():
        if getattr(config, name, None):
            raise ConfigError(
                f"routing replay cannot work with {name}={getattr(config, name)} ({reason}): turn one of them off"
            )


def _install(model: nn.Module) -> list[_Layer]:
    """Put a _Layer into every router of a chunk; in layer order."""
    routers: list[Any] = sorted(
        (m for m in model.modules() if isinstance(m, TopKRouter)), key=lambda router: router.layer_number
    )
    layers = []
    for router in routers:
        if router.router_replay is not None:
            raise ValueError(f"layer {router.layer_number - 1} already has a routing replay; a model can have one")
        router.router_replay = _Layer(router.layer_number - 1)
        layers.append(router.router_replay)
    return layers
