"""Log-probability and entropy of each token from hidden states and the output weight, never holding all logits.

model.py calls it on the last pipeline stage. Logits exist for a chunk of tokens at a time, in forward and, computed
again, in backward; between the two only sums per token are kept. Every tensor-parallel rank gets the same [T] results.
It knows neither megatron-core's modules nor what the results are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_LOGITS = 2**24  # logits held at a time: 64 MiB in fp32, enough tokens for matrix products at full speed


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature), both [T] fp32; entropy None unless asked.

    targets [T] int64 below `vocab_size`; weight [V_padded / tp, H], rank `tp_rank` of `tp_group` holding that slice of
    the rows, of which those from `vocab_size` on are padding and take no part; hidden of the weight's dtype, [T, H] or
    this rank's slice [T / tp, H] (sequence parallel), whose gradient is summed over `tp_group` and has its shape.
    A weight wrapped in megatron-core's DDP gets its gradient added to `weight.main_grad`. fp64 stays fp64.
    """
    tp = dist.get_world_size(tp_group) if tp_group is not None else 1
    tokens = targets.shape[0]
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
    if not (hidden.dim() == weight.dim() == 2 and targets.dim() == 1 and hidden.shape[1] == weight.shape[1]):
        raise ValueError(f"{shapes}: expected [T, H], [V, H] and [T]")
    if hidden.shape[0] != tokens and hidden.shape[0] * tp != tokens:
        raise ValueError(f"{shapes} with tp={tp}: hidden must have all {tokens} tokens, or one {tp}th of them")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}: expected one dtype")
    start = weight.shape[0] * dist.get_rank(tp_group) if tp > 1 else 0
    real = max(0, min(weight.shape[0], vocab_size - start))  # real columns come first on every rank
    cut = _Cut(
        start=start,
        real=real,
        temperature=temperature,
        chunk_tokens=chunk_tokens or max(1, CHUNK_LOGITS // max(real, 1)),
        group=tp_group if tp > 1 else None,
        by_tokens=hidden.shape[0] != tokens,
    )
    logp, entropy = _LinearLogProb.apply(hidden, weight, targets, cut, with_entropy)
    return logp, entropy


@dataclass(frozen=True, slots=True)
class _Cut:
    """Which vocabulary columns and which tokens this rank holds."""

    start: int  # first vocabulary column
    real: int  # how many, without padding
    temperature: float
    chunk_tokens: int
    group: dist.ProcessGroup | None  # None when nothing is cut
    by_tokens: bool  # hidden states are this rank's slice of the tokens

    def all_tokens(self, hidden: Tensor) -> Tensor:
        if not self.by_tokens:
            return hidden
        out = hidden.new_empty(hidden.shape[0] * dist.get_world_size(self.group), hidden.shape[1])
        dist.all_gather_into_tensor(out, hidden.contiguous(), group=self.group)
        return out

    def own_tokens(self, grad: Tensor) -> Tensor:
        """This rank's slice of the hidden states' gradient, summed over the ranks' columns."""
        if self.by_tokens:
            out = grad.new_empty(grad.shape[0] // dist.get_world_size(self.group), grad.shape[1])
            dist.reduce_scatter_tensor(out, grad, group=self.group)
            return out
        if self.group is not None:
            dist.all_reduce(grad, group=self.group)
        return grad

    def own_columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[T] whether this rank holds the target's column, and where (0 when it does not)."""
        mine = (targets >= self.start) & (targets < self.start + self.real)
        return mine, torch.where(mine, targets - self.start, 0)

    def buffer(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(min(self.chunk_tokens, hidden.shape[0]), self.real, dtype=_wide(hidden))

    def logits(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits / temperature, [n, real] in fp32; each chunk overwrites the one before."""
        if self.real == 0:
            return
        columns = weight[: self.real].t()
        buffer = self.buffer(hidden)
        for rows in _chunks(hidden.shape[0], self.chunk_tokens):
            z = buffer[: rows.stop - rows.start]
            if hidden.dtype == z.dtype:
                torch.mm(hidden[rows], columns, out=z)
            else:
                z.copy_(hidden[rows] @ columns)
            if self.temperature != 1.0:
                z.div_(self.temperature)
            yield rows, z


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cut: _Cut, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        highest, total, target_z, weighted = _sums(cut.all_tokens(hidden), weight, targets, cut, with_entropy)
        log_total = total.log()
        entropy = log_total - weighted / total if with_entropy else None
        ctx.set_materialize_grads(False)  # entropy is often only logged: its half of backward is then left out
        ctx.save_for_backward(hidden, weight, targets, highest, total, entropy)
        ctx.cut = cut
        return target_z - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, highest, total, entropy = ctx.saved_tensors
        cut: _Cut = ctx.cut
        if grad_logp is None:
            grad_logp = torch.zeros_like(total)
        mine, column = cut.own_columns(targets)
        on_target = torch.where(mine, grad_logp, 0.0)
        # With e = exp(z - highest): d logp / dz = onehot - e / total;  d entropy / dz = -e / total * (log p + entropy).
        if grad_entropy is None:
            factor = -grad_logp / (total * cut.temperature)
            change = torch.where(mine, -total, 0.0)  # the common factor is left to the [n, H] sides of the products
        else:
            factor = torch.full_like(total, 1 / cut.temperature)
            change = on_target
            slope = -grad_entropy / total
            offset = slope * (entropy - total.log()) - grad_logp / total
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        everything = cut.all_tokens(hidden)
        spare = cut.buffer(everything) if grad_entropy is not None else None
        columns = weight[: cut.real]
        grad_hidden = torch.zeros_like(everything) if wants_hidden else None
        weight_grad = _WeightGradient(weight) if wants_weight else None
        for rows, z in cut.logits(everything, weight):
            z.sub_(highest[rows, None])
            if spare is None:
                z.exp_()
            else:
                exp = torch.exp(z, out=spare[: z.shape[0]])
                z.mul_(slope[rows, None]).add_(offset[rows, None]).mul_(exp)
            z.scatter_add_(1, column[rows, None], change[rows, None])
            dz = z.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = dz @ columns * factor[rows, None]
            if weight_grad is not None:
                weight_grad.add(dz, (everything[rows] * factor[rows, None]).to(weight.dtype))
        return (
            cut.own_tokens(grad_hidden) if grad_hidden is not None else None,
            weight_grad.result() if weight_grad is not None else None,
            None,
            None,
            None,
        )


def _sums(hidden: Tensor, weight: Tensor, targets: Tensor, cut: _Cut, with_entropy: bool) -> tuple[Tensor, ...]:
    """Of each token, over the whole vocabulary: the highest logit h, sum e^(z-h), the target's z-h, sum (z-h) e^(z-h).

    [T] each, on every rank; the last is zero when the entropy is not wanted.
    """
    mine, column = cut.own_columns(targets)
    own_highest = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=_wide(hidden))
    total, chosen, weighted = torch.zeros_like(own_highest).repeat(3, 1)
    spare = cut.buffer(hidden) if with_entropy else None
    for rows, z in cut.logits(hidden, weight):
        own_highest[rows] = z.amax(1)
        z.sub_(own_highest[rows, None])
        chosen[rows] = z.gather(1, column[rows, None]).squeeze(1)
        exp = torch.exp(z, out=z if spare is None else spare[: z.shape[0]])
        total[rows] = exp.sum(1)
        if with_entropy:
            weighted[rows] = torch.linalg.vecdot(exp, z)
    if cut.group is None:
        return own_highest, total, chosen, weighted
    highest = own_highest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=cut.group)
    shift = own_highest - highest
    chosen = torch.where(mine, chosen + shift, 0.0)
    shift = shift.clamp(min=-1000.0)  # exp is 0 there too, and the products below stay finite on a rank of padding
    sums = torch.stack((total * shift.exp(), chosen, (weighted + total * shift) * shift.exp()))
    dist.all_reduce(sums, group=cut.group)
    return highest, *sums


class _WeightGradient:
    """Sums the weight gradient's chunks in fp32: in `main_grad` where megatron-core's DDP has set that, or apart."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        # DDP resets grad_added_to_main_grad before a step; while it is true DDP's hook leaves our part alone. The own
        # gradient of a tied embedding is then still added, because megatron-core sets `zero_out_wgrad` on it.
        main_grad: Any = getattr(weight, "main_grad", None) if hasattr(weight, "grad_added_to_main_grad") else None
        self._in_place = main_grad is not None and main_grad.dtype == _wide(weight)
        self._sum: Tensor = main_grad if self._in_place else torch.zeros_like(weight, dtype=_wide(weight))

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """grad_logits [n, real], hidden [n, H]; rows of padding stay as they are."""
        into = self._sum[: grad_logits.shape[1]]
        if into.dtype == hidden.dtype:
            into.addmm_(grad_logits.t(), hidden)
        else:
            into += grad_logits.t() @ hidden

    def result(self) -> Tensor | None:
        """What autograd is to be given."""
        if not self._in_place:
            return self._sum.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
