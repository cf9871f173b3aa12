"""One pass of megatron-core's pipeline schedule over the micro-batches of a mini-batch, with or without gradients.

Called by policy.py. Knows the schedule and the loss; knows nothing of optimizers, checkpoints or rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megasapo.mcore.emulation import end_pass
from megasapo.mcore.model import TokenScores, forward_micro_batch
from megasapo.mcore.precision import histories_kept
from megasapo.mcore.topology import Topology
from megasapo.metrics import Metrics
from megasapo.types import MicroBatch

# -> (0-dim loss, statistics)
LossFunction = Callable[[TokenScores, MicroBatch], tuple[torch.Tensor, Metrics]]
# what the forward of a micro-batch through a chunk runs inside: RoutingReplay.record or .replay
Routed = Callable[[torch.nn.Module, MicroBatch], AbstractContextManager[None]]


def natively(_chunk: torch.nn.Module, _mb: MicroBatch) -> AbstractContextManager[None]:
    """Routers choose by themselves, and nobody keeps what."""
    return nullcontext()


def logprobs(
    model: list[torch.nn.Module],
    micro: Sequence[MicroBatch],
    topo: Topology,
    *,
    temperature: float,
    routed: Routed = natively,
) -> list[torch.Tensor | None]:
    """Logprobs of the targets of each micro-batch, without gradient: [Tl] float32 on the last stage, None elsewhere."""

    def keep(_mb: MicroBatch, scores: TokenScores) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return scores.logp.sum(), _no_tokens(), scores.logp

    was_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    with torch.no_grad(), histories_kept(model):
        out = _schedule(
            model, micro, topo, keep, routed, temperature=temperature, with_entropy=False, forward_only=True
        )
    for chunk, training in zip(model, was_training, strict=True):
        chunk.train(training)
    if not topo.is_last_stage:
        return [None] * len(micro)
    return out


def forward_backward(
    model: list[torch.nn.Module],
    micro: Sequence[MicroBatch],
    topo: Topology,
    loss_function: LossFunction,
    *,
    temperature: float,
    with_entropy: bool,
    routed: Routed = natively,
) -> list[Metrics]:
    """Add the gradient of the summed loss of all micro-batches to the gradient buffers and reduce them.

    Returns the statistics of each micro-batch on the last pipeline stage, an empty list on the others.
    """

    def loss(mb: MicroBatch, scores: TokenScores) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        value, stats = loss_function(scores, mb)
        return value, _no_tokens(), stats

    stats = _schedule(
        model, micro, topo, loss, routed, temperature=temperature, with_entropy=with_entropy, forward_only=False
    )
    end_pass(model, topo)
    return stats


def _no_tokens() -> torch.Tensor:
    # the loss is already normalised (docs/algorithms.md): nothing is left to divide by
    return torch.tensor(0, dtype=torch.int)


def _schedule(
    model: list[torch.nn.Module],
    micro: Sequence[MicroBatch],
    topo: Topology,
    loss: Callable[[MicroBatch, TokenScores], tuple[torch.Tensor, torch.Tensor, Any]],
    routed: Routed,
    *,
    temperature: float,
    with_entropy: bool,
    forward_only: bool,
) -> list[Any]:
    assert len(micro) > 0, "a rank without samples still runs one empty micro-batch, or collectives hang"

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Any, Any]:
        mb = next(batches)
        with routed(chunk, mb):
            output = forward_micro_batch(chunk, mb, temperature=temperature, topo=topo, with_entropy=with_entropy)
        return output, partial(loss, mb)

    iterators = [iter(micro) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(micro),
        seq_length=max(mb.tokens.numel() for mb in micro),
        micro_batch_size=1,
        forward_only=forward_only,
    )
