"""Time of the SAPO loss alone, forward and backward to the logprobs: ours, the plain formula, and the peers' own.

Everyone gets the same logprobs [rows, tokens] in fp32, one advantage a row and an fp32 mask of responses of uneven
length, and must return the same loss and gradient (checked before anything is timed). The plain formula is the
definition written down in torch with a masked mean; ours also returns ratio and gate of each token; peers run their own
functions with their own few statistics. TRL's formula is part of its trainer's method, so that method runs on a record
of the settings it reads. "finite at +-100": loss and gradient when single tokens have log-ratios of 100 and -100. Peers
that cannot be imported are named and left out (benchmarks/requirements.txt).

    python -m benchmarks.sapo_loss [--quick] [--rows 64] [--tokens 4096] [--threads 1] [--runs 200]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from megasapo.algo import objectives
from megasapo.algo.loss import policy_loss
from megasapo.algo.settings import resolve
from megasapo.config import from_dict

TAU_POS, TAU_NEG = 1.0, 1.05


class Inputs(NamedTuple):
    logp: Tensor  # [rows, tokens], carries gradient
    old_logp: Tensor
    advantages: Tensor  # [rows]
    mask: Tensor  # [rows, tokens] fp32, 0 and 1
    weight: Tensor  # [rows, tokens] fp32: 1 / (rows * length) inside the mask


Loss = Callable[[Inputs], Tensor]


def make_inputs(rows: int, tokens: int, log_ratios: tuple[float, ...] = ()) -> Inputs:
    """Log-ratios of spread 0.1; `log_ratios` are put into the first tokens of every row."""
    generator = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(rows, tokens, generator=generator)
    old = logp + 0.1 * torch.randn(rows, tokens, generator=generator)
    for i, d in enumerate(log_ratios):
        logp[:, i], old[:, i] = min(d, 0.0), min(-d, 0.0)
    lengths = torch.randint(tokens // 8, tokens + 1, (rows,), generator=generator)
    advantages = torch.randn(rows, generator=generator)
    mask = (torch.arange(tokens) < lengths[:, None]).float()
    weight = mask / (rows * lengths[:, None].float())
    tensors = (x.to(measure.device()) for x in (logp, old, advantages, mask, weight))
    given = Inputs(*tensors)
    given.logp.requires_grad_()
    return given


def plain(x: Inputs) -> Tensor:
    a = x.advantages[:, None]
    tau = torch.where(a > 0, TAU_POS, TAU_NEG)
    gated = 4 / tau * torch.sigmoid(tau * ((x.logp - x.old_logp).exp() - 1))
    return -((gated * a * x.mask).sum(1) / x.mask.sum(1)).mean()


def ours(x: Inputs) -> Tensor:
    loss, _ = objectives.sapo(x.logp, x.old_logp, x.advantages[:, None], tau_pos=TAU_POS, tau_neg=TAU_NEG)
    return (x.weight * loss).sum()


def ours_with_statistics() -> Loss:
    """The learner's whole loss: masks, ratio and gate statistics, histograms."""
    cfg = from_dict({"model": {"path": "-"}, "algo": {"tau_pos": TAU_POS, "tau_neg": TAU_NEG}})
    algo = resolve(cfg.algo, cfg.rollout)

    def run(x: Inputs) -> Tensor:
        loss, _ = policy_loss(
            algo,
            logp=x.logp.view(-1),
            old_logp=x.old_logp.view(-1),
            rollout_logp=x.old_logp.view(-1),
            advantages=x.advantages.repeat_interleave(x.logp.shape[1]),
            weight=x.weight.view(-1),
            loss_mask=x.mask.view(-1) > 0,
            sequence_mean=_no_sequences,
        )
        return loss

    return run


def _no_sequences(_: Tensor) -> Tensor:
    raise AssertionError("SAPO needs no mean over a sequence")


def trl() -> Loss:
    from trl import GRPOTrainer

    alone = SimpleNamespace(gather=lambda t: t, reduce=lambda t, reduction: t, num_processes=1)
    settings = SimpleNamespace(
        args=SimpleNamespace(sapo_temperature_pos=TAU_POS, sapo_temperature_neg=TAU_NEG, delta=None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0, use_vllm=False,
        importance_sampling_level="token", loss_type="sapo", current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, accelerator=alone, model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip

    def run(x: Inputs) -> Tensor:
        ids = x.mask  # only their shape matters here
        settings._get_per_token_logps_and_entropies = lambda *_, **__: (x.logp, x.old_logp, None)
        inputs = {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": x.mask,
            "advantages": x.advantages, "old_per_token_logps": x.old_logp,
        }  # fmt: skip
        return GRPOTrainer._compute_loss(settings, None, inputs)

    return run


def verl() -> Loss:
    from verl.trainer.ppo.core_algos import compute_policy_loss_sapo
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, tau_pos=TAU_POS, tau_neg=TAU_NEG)

    def run(x: Inputs) -> Tensor:
        a = x.advantages[:, None].expand_as(x.logp)
        return compute_policy_loss_sapo(x.old_logp, x.logp, a, x.mask, "seq-mean-token-mean", config)[0]

    return run


def liger() -> Loss:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    def run(x: Inputs) -> Tensor:
        loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            x.logp, x.mask, x.advantages, x.mask, old_per_token_logps=x.old_logp, beta=0.0, loss_type="sapo",
            sapo_temperature_pos=TAU_POS, sapo_temperature_neg=TAU_NEG,
        )  # fmt: skip
        return loss

    return run


PEERS = {"trl": trl, "verl": verl, "liger-kernel": liger}


def importable_peers() -> tuple[dict[str, Loss], list[str]]:
    """The peers' losses, and one line for each that cannot be imported."""
    found, missing = {}, []
    for name, make in PEERS.items():
        try:
            found[f"{name} {measure.installed(name)}"] = make()
        except ImportError as e:
            missing.append(f"{name} is left out: {e}")
    return found, missing


def check_agreement(losses: dict[str, Loss], x: Inputs) -> None:
    expected, gradient = value_and_gradient(plain, x)
    for name, loss in losses.items():
        value, grad = value_and_gradient(loss, x)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(grad, gradient, rtol=1e-4, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def value_and_gradient(loss: Loss, x: Inputs) -> tuple[Tensor, Tensor]:
    value = loss(x)
    (grad,) = torch.autograd.grad(value, x.logp)
    return value.detach(), grad


def finite_at_extremes(loss: Loss) -> str:
    value, grad = value_and_gradient(loss, make_inputs(4, 32, (100.0, -100.0)))
    parts = {"loss": value, "gradient": grad}
    broken = [name for name, t in parts.items() if not t.isfinite().all()]
    return "yes" if not broken else "no: " + " and ".join(broken)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 64), ("tokens", 4096), ("threads", 1), ("runs", 200)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--quick", action="store_true", help="20 runs")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    peers, missing = importable_peers()
    losses: dict[str, Loss] = {"plain formula": plain, "megasapo": ours} | peers
    losses["megasapo, with all statistics"] = ours_with_statistics()
    x = make_inputs(args.rows, args.tokens)
    check_agreement(losses, x)

    def run(loss: Loss) -> Callable[[], measure.Seconds]:
        def forward_backward() -> None:
            x.logp.grad = None
            loss(x).backward()

        return lambda: measure.timed(forward_backward)

    runs = 20 if args.quick else args.runs
    seen = measure.alternate({name: run(loss) for name, loss in losses.items()}, runs, warm_up=5)
    rows = []
    for name, loss in losses.items():
        ratio = measure.ratio(seen[name], seen["plain formula"])
        clock = [1e3 * s.clock for s in seen[name]]
        rows.append((
            name, f"{1e3 * measure.median(seen[name]).clock:.2f}", f"{min(clock):.2f}", f"{max(clock):.2f}",
            f"{ratio.clock:.2f}", f"{ratio.cpu:.2f}", finite_at_extremes(loss),
        ))  # fmt: skip
    print(measure.machine("trl", "verl", "liger-kernel"))
    print(f"{args.rows} x {args.tokens} fp32, forward and backward; medians of {runs} alternating runs\n")
    print(measure.table(("loss", "ms", "min", "max", "by plain: clock", "CPU", "finite at +-100"), rows))
    print("\n".join(missing))


if __name__ == "__main__":
    main()
