"""Log-probability and entropy of each token over vocabulary-parallel logits, differentiable.

model.py calls it on the last pipeline stage. Every tensor-parallel rank holds [T, V / tp] logits and gets the same
[T] results; columns beyond the real vocabulary (padding) take no part. It knows nothing of what the results are for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and entropy of softmax(logits / temperature), both [T] fp32; entropy None when not asked for.

    logits [T, V_padded / tp] of any float dtype, targets [T] int64 below `vocab_size`. Ranks of `tp_group` hold the
    columns in rank order.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}: expected [T, V] and [T]")
    logp, entropy = _VocabParallelLogProb.apply(logits, targets, vocab_size, temperature, tp_group)
    return logp, entropy if with_entropy else None


class _VocabParallelLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        vocab_size: int,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        tp = dist.get_world_size(tp_group) if tp_group is not None else 1
        start = logits.shape[1] * dist.get_rank(tp_group) if tp > 1 else 0
        real = max(0, min(logits.shape[1], vocab_size - start))  # real columns come first on every rank
        z = logits[:, :real].float() / temperature
        highest = z.amax(dim=1) if real else z.new_full((z.shape[0],), -torch.inf)
        if tp > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=tp_group)
        z -= highest[:, None]
        exp = z.exp()
        mine = (targets >= start) & (targets < start + real)
        column = torch.where(mine, targets - start, 0)
        chosen = z.gather(1, column[:, None]).squeeze(1) if real else torch.zeros_like(highest)
        sums = torch.stack((exp.sum(1), torch.where(mine, chosen, 0.0), (exp * z).sum(1)))
        if tp > 1:
            dist.all_reduce(sums, group=tp_group)
        total, target_z, weighted = sums
        log_total = total.log()
        entropy = log_total - weighted / total
        probs = exp.div_(total[:, None])
        ctx.set_materialize_grads(False)  # entropy is often only logged: its half of backward is then left out
        ctx.save_for_backward(probs, mine, column, entropy)
        ctx.temperature, ctx.padding, ctx.dtype = temperature, logits.shape[1] - real, logits.dtype
        return target_z - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        probs, mine, column, entropy = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros_like(entropy)
        # d logp / dz = onehot - p;  d entropy / dz = -p (log p + entropy)
        if grad_entropy is None:
            grad = probs * -grad_logp[:, None]
        else:
            grad = probs * -(grad_logp + grad_entropy * entropy)[:, None]
            grad -= torch.special.xlogy(probs, probs) * grad_entropy[:, None]
        if grad.shape[1]:
            grad.scatter_add_(1, column[:, None], torch.where(mine, grad_logp, 0.0)[:, None])
        grad = torch.nn.functional.pad(grad / ctx.temperature, (0, ctx.padding))
        return grad.to(ctx.dtype), None, None, None, None
