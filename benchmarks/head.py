"""Time and extra memory of the output head, forward and backward: ours, full logits, TRL's chunked head, Liger's loss.

Full logits are log_softmax and gather over one matrix product. Liger's `LigerFusedLinearGRPOLoss(loss_type="sapo")`
computes the loss too, so everybody has one beside it. Runs alternate in one process; the table shows medians, by the
clock and in CPU seconds (waiting for a busy core is not in those). Before that everybody's loss and gradients are
compared with ours. Extra memory: on CUDA the allocator's peak; on a CPU the largest sum of bytes of live tensor storage
made between the inputs and the end of backward, counted by a dispatch mode in a run that is not timed (gradients are in
it; inputs, and what a matrix library allocates for itself, are not). TFLOP/s count the three products that the head
cannot do without, 6 T H V; "/ products" is the time by theirs.

    pip install --target DIR --no-deps liger-kernel triton    # Liger's row is left out, and says so, without it
    PYTHONPATH=DIR python -m benchmarks.head [--vocab 32768] [--runs 7] [--device cuda --dtype bfloat16 --batch 16 ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import measure
from megasapo.algo.objectives import sapo
from megasapo.mcore.head import token_logprobs
from megasapo.mcore.head_rows import choose_kernel

TRL_CHUNK = 32768  # vocabulary columns at a time, as its trainers have it (by at most 4096 tokens)
TAU = {"tau_pos": 1.0, "tau_neg": 1.05}


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [B * T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [B * T] int64
    old_logp: Tensor  # [B, T]
    advantages: Tensor  # [B]
    in_loss: Tensor  # [B, T] bool, the last tokens of each sequence
    upstream: Tensor  # [B * T], the gradient of each logprob where there is no loss
    kernel: str  # of ours

    @staticmethod
    def make(args: argparse.Namespace) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        batch, length, dtype = args.batch, args.length, getattr(torch, args.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        hidden, weight = normal(batch * length, args.hidden), 0.05 * normal(args.vocab, args.hidden)
        targets = torch.randint(0, args.vocab, (batch * length,), generator=generator)
        old_logp = -0.5 * (0.05**2 * args.hidden) - torch.tensor(args.vocab).log() + 0.1 * normal(batch, length)
        in_loss = (torch.arange(length) >= round(length * (1 - args.share))).expand(batch, length).contiguous()
        on_device = [t.to(args.device) for t in (targets, old_logp, normal(batch), in_loss, normal(batch * length))]
        return Inputs(
            hidden.to(args.device, dtype).requires_grad_(),
            weight.to(args.device, dtype).requires_grad_(),
            *on_device,
            choose_kernel(args.kernel, torch.device(args.device)),
        )


Head = Callable[[Inputs], Tensor | None]  # a loss to go backward from


class PeakBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive, and the most there were at once."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self._seen = {t.untyped_storage()._cdata for t in given}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes


Scores = tuple[Tensor, Tensor | None]  # [B * T] each: logp, and entropy where it is asked for


def ours(x: Inputs, entropy: bool, where: Tensor | None = None) -> Scores:
    return token_logprobs(
        *(x.hidden, x.weight, x.targets),
        vocab_size=x.weight.shape[0],
        with_entropy=entropy,
        where=where,
        kernel=x.kernel,
    )


def full_logits(x: Inputs, entropy: bool) -> Scores:
    log_probs = (x.hidden @ x.weight.t()).float().log_softmax(-1)
    logp = log_probs.gather(1, x.targets[:, None])[:, 0]
    return logp, -(log_probs.exp() * log_probs).sum(-1) if entropy else None


def trl(x: Inputs, entropy: bool) -> Scores:
    from trl.kernels import ChunkedLogProbFunction

    wanted = ("entropy",) if entropy else ()
    out = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.targets, 1.0, TRL_CHUNK, None, 1.0, wanted)
    return out[0], out[1] if entropy else None


def of_scores(x: Inputs, logp: Tensor, entropy: Tensor | None) -> Tensor:
    return (x.upstream * (logp if entropy is None else logp + 0.01 * entropy)).sum()


def sapo_of(x: Inputs, logp: Tensor) -> Tensor:
    advantages = x.advantages[:, None].expand_as(x.old_logp)
    loss, _ = sapo(logp.view_as(x.old_logp), x.old_logp, advantages, **TAU)
    return (loss * x.in_loss).sum() / x.in_loss.sum()


def liger() -> Head:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        loss_type="sapo",
        sapo_temperature_pos=TAU["tau_pos"],
        sapo_temperature_neg=TAU["tau_neg"],
    )

    def head(x: Inputs) -> Tensor:
        batch, length = x.old_logp.shape
        loss, _ = module(
            x.hidden.view(batch, length, -1),
            x.weight,
            x.targets.view(batch, length),
            x.in_loss.float(),
            x.advantages,
            old_per_token_logps=x.old_logp,
        )
        return loss

    return head


TITLES = {"logp": "logp", "entropy": "logp and entropy", "sapo": "SAPO loss on {:.0%} of the tokens"}


def groups() -> dict[str, dict[str, Head]]:
    def scored(scores: Callable[[Inputs, bool], Scores], entropy: bool) -> Head:
        return lambda x: of_scores(x, *scores(x, entropy))

    every = {"megasapo": ours, "full logits": full_logits, "TRL, chunked": trl}
    out: dict[str, dict[str, Head]] = {
        "logp": {name: scored(scores, False) for name, scores in every.items()},
        "entropy": {name: scored(scores, True) for name, scores in every.items()},
        "sapo": {
            "megasapo": lambda x: sapo_of(x, ours(x, False, x.in_loss.flatten())[0]),
            "full logits": lambda x: sapo_of(x, full_logits(x, False)[0]),
            "TRL, chunked": lambda x: sapo_of(x, trl(x, False)[0]),
        },
    }
    if importlib.util.find_spec("liger_kernel") is None:
        print("Liger is not installed here, its row is left out: see the head of this file\n")
    else:
        out["sapo"]["Liger, SAPO"] = liger()
    return out


def three_products(x: Inputs) -> None:
    """What the head cannot do without, by the same matrix library."""
    with torch.no_grad():
        for hidden in x.hidden.split(2048):
            logits = hidden @ x.weight.t()
            logits @ x.weight
            logits.t() @ hidden


def backward(head: Head, x: Inputs) -> Tensor | None:
    x.hidden.grad = x.weight.grad = None
    loss = head(x)
    if loss is not None:
        loss.backward()
    return loss


def extra_bytes(head: Head, x: Inputs) -> int:
    x.hidden.grad = x.weight.grad = None
    if x.hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backward(head, x)
        return torch.cuda.max_memory_allocated() - before
    tensors = [value for value in vars(x).values() if isinstance(value, Tensor)]
    with PeakBytes(*tensors) as counted:
        backward(head, x)
    return counted.peak


def check_agreement(heads: dict[str, Head], x: Inputs) -> None:
    """Everybody does the same work: loss and gradients are ours up to the dtype's rounding."""
    close = 1e-4 if x.hidden.dtype == torch.float32 else 0.05
    results = {}
    for label, head in heads.items():
        loss = backward(head, x)
        assert loss is not None
        results[label] = [t.detach().float() for t in (loss, x.hidden.grad, x.weight.grad)]
    for label, theirs in results.items():
        for name, mine, other in zip(("loss", "d hidden", "d weight"), results["megasapo"], theirs, strict=True):
            apart = ((mine - other).norm() / mine.norm()).item()
            if not apart < close:
                raise SystemExit(f"{label}: {name} is {apart:.2g} away from ours: not the same work")


COLUMNS = (
    "ms", "CPU ms", "tokens/s", "TFLOP/s", "/ products", "extra MiB", "memory: ours / its", "time: ours / its",
    "CPU time: ours / its",
)  # fmt: skip


def table(title: str, heads: dict[str, Head], x: Inputs, runs: int) -> str:
    check_agreement(heads, x)
    extra = {label: extra_bytes(head, x) for label, head in heads.items()}
    everything: dict[str, Head] = {**heads, "the three products": three_products}
    turns = {label: partial(measure.timed, partial(backward, head, x)) for label, head in everything.items()}
    seen = measure.alternate(turns, runs)
    tokens, flops = x.hidden.shape[0], 6 * x.hidden.numel() * x.weight.shape[0]
    rows = []
    for label, times in seen.items():
        middle, by_products = measure.median(times), measure.ratio(times, seen["the three products"])
        products = by_products.clock if x.hidden.is_cuda else by_products.cpu  # a CPU may be busy with other work
        row = [label, f"{1e3 * middle.clock:.1f}", f"{1e3 * middle.cpu:.1f}", f"{tokens / middle.clock:,.0f}"]
        row += [f"{flops / middle.clock / 1e12:.3g}", f"{products:.2f}"]
        if label in heads:
            by_its = measure.ratio(seen["megasapo"], times)
            row += [f"{extra[label] / 2**20:.1f}", f"{extra['megasapo'] / extra[label]:.2f}"]
            row += [f"{by_its.clock:.2f}", f"{by_its.cpu:.2f}"]
        rows.append([*row, *[""] * (1 + len(COLUMNS) - len(row))])
    return measure.table([title, *COLUMNS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--share", type=float, default=1.0, help="of each sequence's tokens in the loss, the last ones")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--kernel", choices=["auto", "torch", "triton"], default="auto", help="of ours")
    parser.add_argument("--only", choices=list(TITLES), nargs="+", default=list(TITLES), help="these tables")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = Inputs.make(args)
    print(f"{measure.machine('trl', 'liger-kernel')}; on {args.device}, ours: {x.kernel}\n")
    print(
        f"{args.batch} x {args.length} tokens, hidden {args.hidden}, vocabulary {args.vocab}, {args.dtype}; "
        f"medians of {args.runs} alternating runs, forward and backward\n"
    )
    every = groups()
    for name in args.only:
        print(table(TITLES[name].format(args.share), every[name], x, args.runs), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
