"""One side of a checkpoint that changes machines: trains and saves, or loads what another side saved and goes on.

`python -m tests.gpu.checkpoint_side MODEL DIR save|load NAME [--te-like-adam]` runs on a GPU where CUDA shows one, else
on the CPU, and leaves DIR/NAME.pt. --te-like-adam: on a CPU, an Adam with the habits of Transformer Engine's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

STEPS = 2


def main(model: Path, directory: Path, action: str, name: str) -> None:
    import megasapo.mcore  # noqa: F401 (before megatron)
    from megasapo import metrics
    from megasapo.mcore import checkpoint
    from megasapo.mcore.topology import Topology
    from megasapo.sections import ParallelConfig
    from tests.gpu.cases import make_batch, make_policy, settings

    if "--te-like-adam" in sys.argv:
        use_te_like_adam()
    topo = Topology.init(ParallelConfig())
    cfg = settings(model, optim={"lr": 1e-3})
    policy = make_policy(cfg, topo)
    batch = make_batch(cfg, policy, topo)

    def step() -> dict[str, float]:
        return metrics.scalars(metrics.merge(topo.gather(policy.update(policy.with_old_logprobs(batch)))))

    if action == "save":
        for _ in range(STEPS):
            step()
        policy.save(directory / "run", {"step": STEPS})
        policy.finish_saving()
    else:
        latest = checkpoint.latest(directory / "run")
        assert latest is not None
        assert policy.load(latest) == {"step": STEPS}
    weights = {n: t.cpu().clone() for bucket in policy.export(1 << 24) for n, t in bucket}
    parts = getattr(policy._optimizer._inner, "chained_optimizers", [policy._optimizer._inner])
    result: dict[str, Any] = {
        "device": topo.device.type,
        "adam": type(parts[0].optimizer).__name__,
        "weights": weights,
        "state": [totals(part.optimizer) for part in parts],
        "steps": sorted({count for part in parts for count in step_counts(part.optimizer)}),
        "next": step(),
    }
    torch.save(result, directory / f"{name}.pt")
    topo.destroy()


def totals(optimizer: Any) -> dict[str, float]:
    """Sums over everything that Adam works on: masters and both moments."""
    found: dict[str, float] = {"master": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    for group in optimizer.param_groups:
        for p in group["params"]:
            found["master"] += float(p.detach().double().abs().sum())
            for moment in ("exp_avg", "exp_avg_sq"):
                found[moment] += float(optimizer.state[p][moment].double().abs().sum())
    return found


def step_counts(optimizer: Any) -> set[int]:
    """How many steps Adam believes it has taken: fused ones count in the group, torch's in each parameter's state."""
    per_group = {int(group["step"]) for group in optimizer.param_groups if group["params"] and "step" in group}
    per_state = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    return per_state or per_group


class TeLikeAdam(torch.optim.Optimizer):
    """AdamW that keeps its step, a whole number, in the group and needs `bias_correction` there."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, **_: Any) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            if type(group["step"]) is not int:
                raise TypeError(f"step={group['step']!r}: the kernel takes a whole number")
            assert group["bias_correction"]
            (b1, b2), n = group["betas"], group["step"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                m, v = (state.setdefault(k, torch.zeros_like(p)) for k in ("exp_avg", "exp_avg_sq"))
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (m / (1 - b1**n)) / ((v / (1 - b2**n)).sqrt() + group["eps"]))


def use_te_like_adam() -> None:
    """Have megatron-core take TeLikeAdam as it takes Transformer Engine's FusedAdam."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.USING_PYTORCH_OPTIMIZER = False
    for module in (optimizer, distrib_optimizer):
        module.Adam = TeLikeAdam
        module.HAVE_APEX_OR_TE = module.USING_TE_OPTIMIZER = True


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
