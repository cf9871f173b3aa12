"""The optimizer of the learner: megatron-core's DDP, distributed optimizer and schedule from our configuration.

Called by policy.py. Owns the rule for a step whose gradient is not finite: skip, count, stop at a ceiling.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megasapo.config import ConfigError
from megasapo.mcore.fusions import implementation
from megasapo.mcore.slices import own_pieces
from megasapo.sections import OptimConfig

# what a checkpoint decides of an Adam; the rest of its settings belong to the implementation that runs here
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")
TORCH_ADAMS = (torch.optim.AdamW, torch.optim.Adam)  # in torch < 2.7 AdamW is no Adam


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one optimizer step did: the global gradient norm before clipping, and whether the step was taken."""

    grad_norm: float
    taken: bool
    lr: float
    vetoed: bool = False  # not taken, because the caller did not allow it


def wrap_ddp(chunks: list[torch.nn.Module]) -> list[DistributedDataParallel]:
    """Wrap model chunks: gradients are summed over data-parallel ranks, in fp32, never divided.

    The weights of docs/algorithms.md already normalise the loss, so the token count that megatron-core would divide
    by is dropped before its finalisation.
    """
    keeps_fp8 = bool(getattr(chunks[0].config, "fp8_param", False))
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, fp8_param_gather=keeps_fp8
    )
    wrapped = [
        DistributedDataParallel(config=chunk.config, ddp_config=config, module=chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]

    def finalize(model: Any, _num_tokens: Any = None, **kwargs: Any) -> None:
        finalize_model_grads(model, None, **kwargs)

    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize  # type: ignore[union-attr]
    return wrapped


class Optimizer:
    """megatron-core's optimizer and learning-rate schedule, with skipped steps counted."""

    def __init__(self, cfg: OptimConfig, model: list[DistributedDataParallel], total_steps: int):
        """`total_steps`: optimizer steps of the whole run, over which the schedule decays."""
        self._cfg = cfg
        self._inner: MegatronOptimizer = get_megatron_optimizer(_optimizer_config(cfg, model), model)
        self._use_fused_adam()
        if model[0].config.grad_scale_func is None:
            for chunk in model:
                chunk.config.grad_scale_func = self._inner.scale_loss
        self._schedule = OptimizerParamScheduler(
            self._inner,
            init_lr=0.0 if cfg.warmup_steps else cfg.lr,
            max_lr=cfg.lr,
            min_lr=cfg.min_lr,
            lr_warmup_steps=cfg.warmup_steps,
            lr_decay_steps=max(total_steps, cfg.warmup_steps) + 1,  # so that the last step still moves
            lr_decay_style=cfg.schedule,
            start_wd=cfg.weight_decay,
            end_wd=cfg.weight_decay,
            wd_incr_steps=max(total_steps, 1),
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self._rates = [(group["max_lr"], group["min_lr"]) for group in self._inner.param_groups]
        self._schedule.step(1)  # the first step must not have learning rate 0 when there is a warm-up
        self.skipped = 0

    def zero_grad(self) -> None:
        self._inner.zero_grad()

    def step(self, allow: Callable[[float], bool] | None = None) -> StepOutcome:
        """Clip and step, or skip when the global gradient norm is NaN or infinite, or `allow(norm)` is false.

        A skipped step leaves weights and optimizer state as they are; the learning rate goes on. `allow` must answer
        the same on every rank. `skipped` counts those whose gradient was not finite.
        """
        lr = self.lr
        self._inner.prepare_grads()
        norm = float(self._inner.get_grad_norm() or 0.0)
        finite = _everywhere_finite(norm)
        vetoed = finite and allow is not None and not allow(norm)
        taken = finite and not vetoed
        if taken:
            self._inner.step()
        self.skipped += not finite
        self._schedule.step(1)
        return StepOutcome(norm, taken, lr, vetoed)

    @property
    def implementation(self) -> str:
        """The class that megatron-core made, or classes."""
        return implementation([part.optimizer for part in self._parts])

    @property
    def lr(self) -> float:
        return float(self._inner.param_groups[0]["lr"]) if self._inner.param_groups else float("nan")

    def sharded_state_dict(self, model_state: dict[str, Any], is_loading: bool) -> dict[str, Any]:
        """Masters and moments under names that depend on no layout: to save this rank's own, to load whole ones."""
        self._allocate_state(is_loading)
        if not is_loading:
            return {str(i): own_pieces(part, model_state) for i, part in enumerate(self._parts)}
        metadata = {
            # of the formats that survive a change of layout this is the one neither 0.16 nor 0.19 deprecates
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,  # how many optimizers share the parameters depends on the layout
        }
        state = self._inner.sharded_state_dict(model_state, is_loading=True, metadata=metadata)
        wanted = [state] if len(self._parts) == 1 else [state[i] for i in range(len(self._parts))]
        return {str(i): part["param_state"] for i, part in enumerate(wanted)}

    def _allocate_state(self, is_loading: bool) -> None:
        """Give an optimizer that has not stepped yet the zeros that it would begin with, to save or to load into.

        Needed with 0.16.1 to 0.19.2, whose distributed optimizer asks every state for its step before it is loaded or
        saved. What fused Adams are loaded into is made by megatron-core.
        """
        for part in self._parts:
            if not isinstance(part.optimizer, TORCH_ADAMS):
                if not is_loading:
                    part.init_state_fn(part.optimizer, part.config)
                    for group in part.optimizer.param_groups:
                        group.setdefault("step", 0)  # torch's AdamW could not load a checkpoint without
                continue
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    state = part.optimizer.state[parameter]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"] = torch.zeros_like(parameter)
                        state["exp_avg_sq"] = torch.zeros_like(parameter)

    def load_state_dict(self, tensors: dict[str, Any], settings: dict[str, Any]) -> None:
        """Take over what `sharded_state_dict` and `settings` gave, maybe of another Adam: torch's, TE's, Apex's."""
        adam = {**settings["adam"], "betas": tuple(settings["adam"]["betas"])}
        states = [part.state_dict() for part in self._parts]
        for i, state in enumerate(states):
            for group in state["optimizer"]["param_groups"]:
                group.update(adam)
            state |= {"param_state": tensors[str(i)], "param_state_sharding_type": "fully_reshardable"}
        own = [[dict(group) for group in part.optimizer.param_groups] for part in self._parts]
        self._inner.load_state_dict(states if len(states) > 1 else states[0])
        for part, groups in zip(self._parts, own, strict=True):
            for group, before in zip(part.optimizer.param_groups, groups, strict=True):
                mine = before.keys() & part.optimizer.defaults.keys() - set(HYPERPARAMETERS)
                group.update({name: before[name] for name in mine})
                if "step" in group:  # torch's Adams count in fp32, the kernels of fused ones take nothing but an int
                    group["step"] = int(group["step"])
        self._load_schedule(settings)

    def settings(self) -> dict[str, Any]:
        """JSON values, equal on every rank: what a checkpoint keeps beside tensors."""
        self._allocate_state(is_loading=False)
        group = next(g for part in self._parts for g in part.state_dict()["optimizer"]["param_groups"])
        adam = {"betas": list(group["betas"]), "eps": group["eps"], "step": int(group["step"])}
        return {"adam": adam, "schedule": self._schedule.state_dict(), "skipped": self.skipped}

    def _load_schedule(self, state: dict[str, Any]) -> None:
        # load_state_dict steps from where the object stands; it must start from 0
        self._schedule.num_steps = 0
        # the configuration wins over what the run began with; and 0.16.1 mixes groups up that differ in this alone
        for group, (most, least) in zip(self._inner.param_groups, self._rates, strict=True):
            group["max_lr"], group["min_lr"] = most, least
        self._schedule.load_state_dict(state["schedule"])
        self.skipped = state["skipped"]

    def _use_fused_adam(self) -> None:
        """On a CPU let torch's Adam, megatron-core's choice without TE and Apex, pass over its tensors once."""
        for part in self._parts:
            if isinstance(part.optimizer, TORCH_ADAMS) and not torch.cuda.is_available():
                for group in part.optimizer.param_groups:
                    group["fused"] = True

    @property
    def _parts(self) -> list[Any]:
        """megatron-core's distributed optimizers, which share the parameters: one, or another for experts."""
        return getattr(self._inner, "chained_optimizers", [self._inner])


def _everywhere_finite(norm: float) -> bool:
    """The same answer on every rank: ranks that disagree about taking a step would hang at the next collective."""
    flag = torch.tensor([0 if math.isfinite(norm) else 1], device="cuda" if torch.cuda.is_available() else "cpu")
    torch.distributed.all_reduce(flag)
    return int(flag) == 0


# Fields that other settings decide; overriding them here would contradict the model, or the schedule
OWN_FIELDS = {
    "lr": "optim.lr",
    "min_lr": "optim.min_lr",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.eps",
    "clip_grad": "optim.clip_grad",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "params_dtype": "model.dtype",
    "fp8_recipe": "precision.recipe",
    "reuse_grad_buf_for_mxfp8_param_ag": "precision.fp8_param",
}


# Without these there is no master, or no moment, where a checkpoint looks for it (slices.py); from 0.16.1 to 0.19.2
FIXED = {
    "optimizer": "adam",
    "use_distributed_optimizer": True,
    "use_layer_wise_distributed_optimizer": False,
    "optimizer_cpu_offload": False,
}


def _optimizer_config(cfg: OptimConfig, model: list[DistributedDataParallel]) -> OptimizerConfig:
    config: Any = model[0].config
    dtype = config.params_dtype
    values: dict[str, Any] = {
        "optimizer": "adam",
        "lr": cfg.lr,
        "min_lr": cfg.min_lr,
        "weight_decay": cfg.weight_decay,
        "adam_beta1": cfg.beta1,
        "adam_beta2": cfg.beta2,
        "adam_eps": cfg.eps,
        "clip_grad": cfg.clip_grad,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": True,
        "fp8_recipe": config.fp8_recipe if config.fp8 and config.fp8_param else None,
    }
    known = [f.name for f in fields(OptimizerConfig)]
    for name, value in cfg.override_optimizer_config.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"optim.override_optimizer_config: megatron-core has no {name!r}{hint}")
        if name in OWN_FIELDS:
            raise ConfigError(f"optim.override_optimizer_config: {name} follows from `{OWN_FIELDS[name]}`; set that")
        if value != FIXED.get(name, value):
            raise ConfigError(
                f"optim.override_optimizer_config: with {name}={value} the optimizer's state could not be saved, which "
                f"only that of megatron-core's distributed Adam can be, where it is on the learner's device: leave "
                f"{name} out"
            )
        values[name] = value
    try:
        return OptimizerConfig(**values)
    except (AssertionError, TypeError, ValueError) as e:
        if not cfg.override_optimizer_config:
            raise
        raise ConfigError(f"optim.override_optimizer_config={cfg.override_optimizer_config}: {e}") from e
