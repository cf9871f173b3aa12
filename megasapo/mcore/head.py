"""Log-probability and entropy of each token from hidden states and the output weight, never holding all logits.

model.py calls it on the last pipeline stage. Logits exist for a chunk of tokens at a time, in forward and, computed
again, in backward; between the two only sums per token are kept. A tensor-parallel rank gets the results of its slice
of the tokens. It knows neither megatron-core's modules nor what the results are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasapo.mcore.head_rows import Coefficients, RowKernel, row_kernel, wide
from megasapo.mcore.main_grad import WeightGradient

# Logits held at a time: enough tokens for matrix products at full speed. On a CPU more was no faster.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**29}

Rows = slice | Tensor  # which tokens: a range, or [n] int64


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    where: Tensor | None = None,
    chunk_tokens: int | None = None,
    kernel: str = "torch",
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature), fp32; entropy None unless asked.

    Both are [T / tp]: consecutive slice number `tp_rank` of the tokens, all of them without `tp_group`. The loss is the
    sum of what the ranks make of their slices; each rank's must use the results, or backward waits for it forever.
    targets [T] int64 below `vocab_size`, the same on all ranks of `tp_group`; weight [V_padded / tp, H], this rank's
    slice of the rows, of which those from `vocab_size` on are padding and take no part; hidden [T / tp, H] of the
    weight's dtype, this rank's slice (sequence parallel). `where` [T] bool, the same on all ranks: only these tokens
    are computed, the others get 0 and no gradient; on the host it spares a wait for the device. Tokens without gradient
    cost nothing in backward.
    A weight wrapped in megatron-core's DDP gets its gradient added to `weight.main_grad`. fp64 stays fp64.
    kernel: what works on rows of logits, "torch" or "triton" (head_rows.py); matrix products are torch's in both.
    """
    tp = dist.get_world_size(tp_group) if tp_group is not None else 1
    rank = dist.get_rank(tp_group) if tp > 1 else 0
    _check(hidden, weight, targets, where, tp)
    start = weight.shape[0] * rank
    real = max(0, min(weight.shape[0], vocab_size - start))  # real columns come first on every rank
    chunk_bytes = CHUNK_BYTES["cpu" if weight.device.type == "cpu" else "cuda"]
    cut = _Cut(
        columns=weight.shape[0],
        start=start,
        real=real,
        temperature=temperature,
        chunk_tokens=chunk_tokens or max(1, chunk_bytes // (max(real, 1) * weight.element_size())),
        kernel=row_kernel(kernel),
        tp=tp,
        rank=rank,
        group=tp_group if tp > 1 else None,
    )
    logp, entropy = _LinearLogProb.apply(hidden, weight, targets, where, cut, with_entropy)
    return logp, entropy


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, where: Tensor | None, tp: int) -> None:
    tokens = targets.shape[0]
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
    if not (hidden.dim() == weight.dim() == 2 and targets.dim() == 1 and hidden.shape[1] == weight.shape[1]):
        raise ValueError(f"{shapes}: expected [T, H], [V, H] and [T]")
    if tokens % tp:
        raise ValueError(f"{tokens} targets do not divide by tp={tp}: pad the tokens to a multiple of it")
    if hidden.shape[0] * tp != tokens:
        raise ValueError(f"{shapes} with tp={tp}: hidden must have one {tp}th of {tokens} tokens")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}: expected one dtype")
    if where is not None and (where.shape != targets.shape or where.dtype != torch.bool):
        raise ValueError(f"where is {where.dtype} {tuple(where.shape)}: expected torch.bool {tuple(targets.shape)}")


@dataclass(frozen=True, slots=True)
class _Cut:
    """Which vocabulary columns and which tokens this rank holds, and how they meet those of the other ranks."""

    columns: int  # of each rank, padding included
    start: int  # first vocabulary column
    real: int  # how many, without padding
    temperature: float
    chunk_tokens: int
    tp: int
    rank: int
    group: dist.ProcessGroup | None  # None when nothing is cut
    kernel: RowKernel

    def own(self, per_token: Tensor) -> Tensor:
        """[T] -> [T / tp], this rank's slice."""
        return per_token.chunk(self.tp)[self.rank] if self.tp > 1 else per_token

    def all_tokens(self, hidden: Tensor) -> Tensor:
        if self.group is None:
            return hidden
        out = hidden.new_empty(hidden.shape[0] * self.tp, hidden.shape[1])
        dist.all_gather_into_tensor(out, hidden.contiguous(), group=self.group)
        return out

    def own_tokens(self, grad: Tensor) -> Tensor:
        """This rank's slice of the hidden states' gradient, summed over the ranks' columns."""
        if self.group is None:
            return grad
        out = grad.new_empty(grad.shape[0] // self.tp, grad.shape[1])
        dist.reduce_scatter_tensor(out, grad, group=self.group)
        return out

    def combine(self, sums: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """[4, T] sums over this rank's columns -> four [T / tp] over all columns, of this rank's slice of the tokens.

        In: highest logit h, sum e^(z-h), the target's z, sum (z-h) e^(z-h). Out: the same, but z-h of the target.
        """
        if self.group is None:
            highest, total, target_z, weighted = sums
            return highest, total, target_z - highest, weighted
        send = sums.view(4, self.tp, -1).transpose(0, 1).contiguous()
        parts = torch.empty_like(send)
        dist.all_to_all_single(parts, send, group=self.group)
        highests, totals, target_zs, weighteds = parts.unbind(1)  # [tp, T / tp] each
        highest = highests.amax(0)
        shift = (highests - highest).clamp(min=-1000.0)  # exp is 0 there too, and a rank of padding gives 0, not NaN
        scale = shift.exp()
        holder = self.own(targets) // self.columns
        target_z = target_zs.gather(0, holder[None])[0] - highest
        return highest, (totals * scale).sum(0), target_z, ((weighteds + totals * shift) * scale).sum(0)

    def gather(self, per_token: Sequence[Tensor]) -> Sequence[Tensor]:
        """[T / tp] each -> [T] each, from all ranks."""
        if self.group is None:
            return per_token
        send = torch.stack(tuple(per_token))
        parts = send.new_empty(self.tp * send.shape[0], send.shape[1])  # gloo wants the ranks' parts one below another
        dist.all_gather_into_tensor(parts, send, group=self.group)
        return parts.view(self.tp, *send.shape).transpose(0, 1).reshape(len(per_token), -1).unbind(0)

    def own_columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[T] whether this rank holds the target's column, and where (0 when it does not)."""
        mine = (targets >= self.start) & (targets < self.start + self.real)
        return mine, torch.where(mine, targets - self.start, 0)

    def logits(self, hidden: Tensor, weight: Tensor, wanted: Tensor | None) -> Iterator[tuple[Rows, Tensor, Tensor]]:
        """Of all tokens, or the `wanted` [n] int64: which, their hidden states, and logits before the temperature.

        Each chunk of logits overwrites the one before.
        """
        if self.real == 0:
            return
        columns = weight[: self.real].t()
        tokens = hidden.shape[0] if wanted is None else wanted.shape[0]
        buffer = hidden.new_empty(min(self.chunk_tokens, tokens), self.real)
        for rows in _chunks(tokens, self.chunk_tokens, wanted):
            states = hidden[rows]
            z = buffer[: states.shape[0]]
            torch.mm(states, columns, out=z)
            yield rows, states, z


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, where: Tensor | None, cut: _Cut, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        wanted = _indices(where, targets.device)
        sums = _sums(cut.all_tokens(hidden), weight, targets, wanted, cut, with_entropy)
        highest, total, target_z, weighted = cut.combine(sums, targets)
        log_total = total.log()
        logp = target_z - log_total
        entropy = log_total - weighted / total if with_entropy else None
        where = where.to(targets.device) if where is not None and wanted is not None else None  # None: all tokens
        if where is not None:
            logp = torch.where(cut.own(where), logp, 0.0)
            entropy = torch.where(cut.own(where), entropy, 0.0) if entropy is not None else None
        ctx.set_materialize_grads(False)  # entropy is often only logged: its half of backward is then left out
        ctx.save_for_backward(hidden, weight, targets, where, highest, total, entropy)
        ctx.cut = cut
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, where, highest, total, entropy = ctx.saved_tensors
        cut: _Cut = ctx.cut
        per_token = _PerToken.gather(cut, grad_logp, grad_entropy, highest, total, entropy)
        wanted = per_token.with_gradient(where)
        mine, column = cut.own_columns(targets)
        by = per_token.coefficients(mine, cut.temperature)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        everything = cut.all_tokens(hidden)
        columns = weight[: cut.real]
        grad_hidden = torch.zeros_like(everything) if wants_hidden else None
        weight_grad = WeightGradient(weight) if wants_weight else None
        for rows, states, z in cut.logits(everything, weight, wanted):
            cut.kernel.gradients(z, column[rows], cut.temperature, by.of(rows))
            if grad_hidden is not None:
                grad_hidden[rows] = (z @ columns * by.factor[rows, None]).to(weight.dtype)
            if weight_grad is not None:
                weight_grad.add(z, (states * by.factor[rows, None]).to(weight.dtype))
        return (
            cut.own_tokens(grad_hidden) if grad_hidden is not None else None,
            weight_grad.result() if weight_grad is not None else None,
            *(None,) * 4,
        )


@dataclass(frozen=True, slots=True)
class _PerToken:
    """What backward needs of each token, [T] each, the same on all ranks."""

    highest: Tensor
    total: Tensor
    grad_logp: Tensor
    entropy: Tensor | None
    grad_entropy: Tensor | None  # None when no loss used the entropy

    @staticmethod
    def gather(
        cut: _Cut,
        grad_logp: Tensor | None,
        grad_entropy: Tensor | None,
        highest: Tensor,
        total: Tensor,
        entropy: Tensor | None,
    ) -> _PerToken:
        grad_logp = torch.zeros_like(total) if grad_logp is None else grad_logp
        if entropy is None or (grad_entropy is None and cut.group is None):
            highest, total, grad_logp = cut.gather((highest, total, grad_logp))
            return _PerToken(highest, total, grad_logp, None, None)
        # Always sent where there is an entropy, so that ranks agree on the shape whatever their losses used.
        grad_entropy = torch.zeros_like(total) if grad_entropy is None else grad_entropy
        own = (highest, total, grad_logp, entropy, grad_entropy)
        highest, total, grad_logp, entropy, grad_entropy = cut.gather(own)
        return _PerToken(highest, total, grad_logp, entropy, grad_entropy if grad_entropy.any() else None)

    def with_gradient(self, where: Tensor | None) -> Tensor | None:
        """The tokens that have any, [n] int64; None for all of them."""
        has = self.grad_logp != 0
        if self.grad_entropy is not None:
            has |= self.grad_entropy != 0
        return _indices(has if where is None else has & where, has.device)

    def coefficients(self, mine: Tensor, temperature: float) -> Coefficients:
        if self.grad_entropy is None or self.entropy is None:
            # the common factor is left to the [n, H] sides of the products
            factor = -self.grad_logp / (self.total * temperature)
            return Coefficients(factor, self.highest, torch.where(mine, -self.total, 0.0))
        slope = -self.grad_entropy / self.total
        offset = slope * (self.entropy - self.total.log()) - self.grad_logp / self.total
        factor = torch.full_like(slope, 1 / temperature)
        return Coefficients(factor, self.highest, torch.where(mine, self.grad_logp, 0.0), slope, offset)


def _sums(
    hidden: Tensor, weight: Tensor, targets: Tensor, wanted: Tensor | None, cut: _Cut, with_entropy: bool
) -> Tensor:
    """[4, T] of this rank's columns, as a RowKernel's sums; -inf and zeros for tokens that are not wanted."""
    _, column = cut.own_columns(targets)
    sums = hidden.new_zeros(4, targets.shape[0], dtype=wide(hidden))
    sums[0].fill_(-torch.inf)
    for rows, _, z in cut.logits(hidden, weight, wanted):
        sums[:, rows] = cut.kernel.sums(z, column[rows], cut.temperature, with_entropy)
    return sums


def _indices(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """[n] int64 where the mask is true; None when it is everywhere, which needs no copies of rows."""
    if mask is None:
        return None
    indices = mask.nonzero().squeeze(1)
    return None if indices.shape[0] == mask.shape[0] else indices.to(device)


def _chunks(count: int, size: int, wanted: Tensor | None) -> Iterator[Rows]:
    """`count` tokens, or those that are wanted, in as few and as equal parts of at most `size` as can be."""
    parts = -(-count // size)
    for i in range(parts):
        rows = slice(i * count // parts, (i + 1) * count // parts)
        yield rows if wanted is None else wanted[rows]
