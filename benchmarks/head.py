"""Time and extra memory of the output head, forward and backward: ours, full logits, and TRL's chunked head.

Full logits are log_softmax and gather over one matrix product. Runs alternate in one process; the table shows medians,
by the clock and in CPU seconds (waiting for a busy core is not in those). Extra memory is the largest sum of bytes of
live tensor storage allocated between the inputs and the end of backward, counted by a dispatch mode in a run that is
not timed: the gradients are in it, the inputs and what a matrix library allocates for itself are not.

    python benchmarks/head.py [--tokens 2048] [--hidden 256] [--vocab 32768] [--dtype float32] [--threads 1] [--runs 7]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.kernels import ChunkedLogProbFunction

from megasapo.mcore.head import token_logprobs

TRL_CHUNK = 32768  # vocabulary columns at a time, as its trainers have it (by at most 4096 tokens)

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [T, H], weight [V, H], targets [T] -> a loss


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


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, targets, vocab_size=weight.shape[0])[0]


def ours_with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logp, entropy = token_logprobs(hidden, weight, targets, vocab_size=weight.shape[0], with_entropy=True)
    assert entropy is not None
    return logp + 0.01 * entropy


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def full_logits_with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_probs = (hidden @ weight.t()).float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(1, targets[:, None])[:, 0] + 0.01 * entropy


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0]


def trl_with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    out = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return out[0] + 0.01 * out[1]


HEADS: dict[str, dict[str, Head]] = {
    "logp": {"megasapo": ours, "full logits": full_logits, "TRL, chunked": trl},
    "logp and entropy": {
        "megasapo": ours_with_entropy,
        "full logits": full_logits_with_entropy,
        "TRL, chunked": trl_with_entropy,
    },
}


def run(head: Head, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor) -> tuple[float, float]:
    """Seconds by the clock and of CPU."""
    inputs[0].grad = inputs[1].grad = None
    clock, cpu = time.perf_counter(), time.process_time()
    (head(*inputs) * upstream).sum().backward()
    return time.perf_counter() - clock, time.process_time() - cpu


def peak(head: Head, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor) -> int:
    inputs[0].grad = inputs[1].grad = None
    with PeakBytes(*inputs, upstream) as counted:
        (head(*inputs) * upstream).sum().backward()
    return counted.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden, generator=generator).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(args.vocab, args.hidden, generator=generator)).to(dtype).requires_grad_()
    inputs = (hidden, weight, torch.randint(0, args.vocab, (args.tokens,), generator=generator))
    upstream = torch.randn(args.tokens, generator=generator)
    print(
        f"{datetime.date.today()}, {platform.machine()}, {args.threads} thread(s), python {platform.python_version()}, "
        f"torch {torch.__version__}, TRL {importlib.metadata.version('trl')}\n"
        f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}, {args.dtype}; "
        f"medians of {args.runs} alternating runs, forward and backward"
    )
    for name, heads in HEADS.items():
        columns = f"{'seconds':>9}{'min':>8}{'max':>8}{'CPU s':>8}{'extra MiB':>11}"
        print(f"{name:18}{columns}   ours by theirs: time  CPU  memory")
        times: dict[str, list[tuple[float, float]]] = {label: [] for label in heads}
        for _ in range(args.runs + 1):
            for label, head in heads.items():
                times[label].append(run(head, inputs, upstream))
        mine = times["megasapo"][1:]  # the first is a warm-up
        extra = {label: peak(head, inputs, upstream) for label, head in heads.items()}
        for label in heads:
            theirs = times[label][1:]
            clock, cpu = zip(*theirs, strict=True)
            by_clock, by_cpu = (
                statistics.median(a[i] / b[i] for a, b in zip(mine, theirs, strict=True)) for i in (0, 1)
            )
            print(
                f"  {label:16}{statistics.median(clock):9.3f}{min(clock):8.3f}{max(clock):8.3f}"
                f"{statistics.median(cpu):8.3f}{extra[label] / 2**20:11.1f}"
                f"{by_clock:23.2f}{by_cpu:5.2f}{extra['megasapo'] / extra[label]:8.2f}"
            )


if __name__ == "__main__":
    main()
