"""Time of one micro-batch's policy loss, forward and backward with its statistics, against the bare formula.

python benchmarks/sapo_loss.py [--tokens 32768] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from megasapo.algo.loss import policy_loss
from megasapo.algo.settings import resolve
from megasapo.config import from_dict
from megasapo.data.packing import pack, sequence_mean
from megasapo.types import TrainSequence


def seconds(run: Callable[[], None], device: str, repeats: int = 20) -> float:
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    n = 1025
    mask = np.arange(n) >= 128
    sequences = [
        TrainSequence(uid, np.zeros(n, np.int32), mask, np.zeros(n, np.float32), float(rng.normal()))
        for uid in range(max(1, args.tokens // (n - 1)))
    ]
    mb = pack(sequences, [1e-6] * len(sequences))
    mb = mb.with_(**{k: getattr(mb, k).to(args.device) for k in mb.__slots__ if torch.is_tensor(getattr(mb, k))})
    logp = -torch.rand(mb.tokens.numel(), device=args.device)
    old = (logp + 0.1 * torch.randn_like(logp)).detach()
    logp.requires_grad_()

    def bare() -> None:
        tau = torch.where(mb.advantage > 0, 1.0, 1.05)
        value = -4 / tau * torch.sigmoid(tau * ((logp - old).exp() - 1)) * mb.advantage
        (value * mb.weight).sum().backward()

    print(f"{mb.tokens.numel()} tokens on {args.device}")
    print(f"bare formula  {1e3 * seconds(bare, args.device):8.3f} ms")
    for objective in ("sapo", "grpo", "gspo", "gmpo", "cispo", "reinforce"):
        cfg = from_dict({"model": {"path": "-"}, "algo": {"objective": objective}})
        algo = resolve(cfg.algo, cfg.rollout)

        def whole(algo=algo) -> None:
            loss, _ = policy_loss(
                algo, logp=logp, old_logp=old, rollout_logp=old, advantages=mb.advantage, weight=mb.weight,
                loss_mask=mb.loss_mask, sequence_mean=sequence_mean(mb),
            )  # fmt: skip
            loss.backward()

        print(f"{objective:12}  {1e3 * seconds(whole, args.device):8.3f} ms with statistics")


if __name__ == "__main__":
    main()
