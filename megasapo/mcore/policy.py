"""The policy being trained: model, reference weights, optimizer, checkpoints, behind the handful of calls a loop needs.

Called by train.py and sft.py. The rest of the program sees tensors of token ids and HF names, never megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megasapo import checkpoints, metrics
from megasapo.algo.loss import policy_loss
from megasapo.algo.settings import ResolvedAlgo
from megasapo.config import Config
from megasapo.data.packing import sequence_mean
from megasapo.errors import UserError
from megasapo.geometry import read_geometry
from megasapo.mcore import bridge, checkpoint, model, step
from megasapo.mcore.fusions import Fusions
from megasapo.mcore.model import TokenScores
from megasapo.mcore.optim import Optimizer, wrap_ddp
from megasapo.mcore.precision import unquantised
from megasapo.mcore.replay import RoutingReplay
from megasapo.mcore.routing_exchange import RoutingLayout
from megasapo.mcore.saver import Saver
from megasapo.mcore.topology import Topology
from megasapo.metrics import Max, Mean, Metrics, Sum
from megasapo.types import Batch, MicroBatch, MiniBatch

# of each micro-batch: [Tl] float32 on the last pipeline stage, None elsewhere
Logprobs = list[torch.Tensor | None]
# of each micro-batch: what RoutingReplay recorded, None where routers choose by themselves
Routings = Sequence[torch.Tensor | None]
# of each model chunk, by parameter name
Weights = list[dict[str, torch.Tensor]]
# (which mini-batch, its statistics merged over ranks) -> whether its optimizer step may be taken
Allow = Callable[[int, Mapping[str, float]], bool]


class TooManySkips(UserError, ArithmeticError):
    """Gradients are NaN or infinite again and again: raised on every rank."""


class Policy:
    """A megatron-core model on this rank, ready to learn."""

    def __init__(self, cfg: Config, topo: Topology, algo: ResolvedAlgo, *, temperature: float, total_steps: int):
        """`temperature`: that of sampling, by which logits are divided; `total_steps`: optimizer steps of the run."""
        self._cfg, self._topo, self._algo, self._temperature = cfg, topo, algo, temperature
        self.hf_config = model.read_hf_config(cfg.model.path)
        self._chunks = model.build_model(
            cfg.model, self.hf_config, topo, recompute=cfg.train.recompute, precision=cfg.precision
        )
        checkpoint.load_start(cfg.model, self._chunks, topo)
        self._reference = self.copy_weights() if algo.kl_coef else None
        self._ddp = wrap_ddp(self._chunks)
        self._optimizer = Optimizer(cfg.optim, self._ddp, total_steps)
        needs_replay = cfg.algo.routing_replay != "none" or cfg.routing.diagnose_every > 0
        self._saver = Saver(cfg.train, topo)
        self._replay = RoutingReplay(self._ddp) if needs_replay else None
        self.routing_layout = RoutingLayout.of(topo, self._replay) if self._replay is not None else None
        self.quantises = cfg.precision.quantises

    def unquantised(self) -> AbstractContextManager[None]:
        """Inside, logprobs are those of the same weights in model.dtype, nothing rounded to FP8."""
        return unquantised(self._chunks)

    def with_old_logprobs(self, batch: Batch, *, first: bool = False) -> Batch:
        """Set old_logp (ref_logp when KL is on, routing for R2) of every micro-batch, with the weights as they are now.

        Under R3 the batch brings its routing; the reference model always routes by itself. The first mini-batch is
        left without, unless asked for: its update starts from these very weights, so its own logprobs and routing are
        the old ones. `algo.old_logprobs: rollout` takes the server's logprobs instead.
        """
        old, routing = zip(
            *(self._old_logprobs(mini, needed=first or i > 0) for i, mini in enumerate(batch.mini)), strict=True
        )
        reference: list[Logprobs] = [[None] * len(mini.micro) for mini in batch.mini]
        if self._reference is not None:
            with self.at(self._reference):  # once a batch: it copies all weights twice
                reference = [self._logprobs(mini.micro) for mini in batch.mini]
        return Batch(tuple(_with_logprobs(*parts) for parts in zip(batch.mini, old, reference, routing, strict=True)))

    def _old_logprobs(self, mini: MiniBatch, *, needed: bool) -> tuple[Logprobs, Routings]:
        given: Routings = [mb.routing for mb in mini.micro]
        if self._cfg.algo.old_logprobs == "rollout":
            return [mb.rollout_logp for mb in mini.micro], given
        if not needed:
            return [None] * len(mini.micro), given
        match self._cfg.algo.routing_replay:
            case "R2":
                return self.natural_logprobs(mini.micro)
            case "R3":
                return self.routed_logprobs(mini.micro, given), given
        return self._logprobs(mini.micro), given

    def natural_logprobs(self, micro: tuple[MicroBatch, ...]) -> tuple[Logprobs, list[torch.Tensor]]:
        """Collective. Logprobs of each micro-batch without gradient, and the routing that they came with."""
        assert self._replay is not None, "a Policy without routing replay records nothing"
        return self._logprobs(micro, self._replay.record), self._replay.take()

    def routed_logprobs(self, micro: tuple[MicroBatch, ...], routing: Routings) -> Logprobs:
        """Collective. Logprobs of each micro-batch without gradient where routers choose as in `routing`."""
        assert self._replay is not None, "a Policy without routing replay forces nothing"
        routed = tuple(mb.with_(routing=z) for mb, z in zip(micro, routing, strict=True))
        return self._logprobs(routed, self._replay.replay)

    def _logprobs(self, micro: tuple[MicroBatch, ...], routed: step.Routed = step.natively) -> Logprobs:
        return step.logprobs(self._ddp, micro, self._topo, temperature=self._temperature, routed=routed)

    def update(self, batch: Batch, allow: Allow | None = None) -> Metrics:
        """One optimizer step a mini-batch; this rank's share of the statistics, to be merged over all ranks.

        `allow` is asked before each step and must answer the same on every rank; without it nothing is gathered.
        Raises TooManySkips beyond optim.max_skipped_steps.
        """
        may = [None if allow is None else partial(allow, i) for i in range(len(batch.mini))]
        return metrics.merge(
            [self._step(m, self._policy_loss, with_entropy=True, allow=a) for m, a in zip(batch.mini, may, strict=True)]
        )

    def update_supervised(self, mini: MiniBatch) -> Metrics:
        """One optimizer step on the weighted negative log-likelihood of the loss tokens."""
        return self._step(mini, _supervised_loss, with_entropy=False)

    def _step(
        self,
        mini: MiniBatch,
        loss_function: step.LossFunction,
        *,
        with_entropy: bool,
        allow: Callable[[Mapping[str, float]], bool] | None = None,
    ) -> Metrics:
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        routing: AbstractContextManager[step.Routed] = nullcontext(step.natively)
        if self._replay is not None and mini.micro[0].routing is not None:
            routing = self._replay.step()
        with routing as routed:
            parts = step.forward_backward(
                self._ddp,
                mini.micro,
                self._topo,
                loss_function,
                temperature=self._temperature,
                with_entropy=with_entropy,
                routed=routed,
            )
        counted = metrics.to_host(metrics.merge(parts))
        outcome = self._optimizer.step(None if allow is None else partial(self._allowed, allow, counted))
        self._refuse_more_skips(outcome.grad_norm)
        if self._topo.rank == 0:  # equal on all ranks
            finite = outcome.taken or outcome.vetoed
            counted["grad/norm"] = Mean(outcome.grad_norm, 1.0) if finite else Mean(0.0, 0.0)
            counted["grad/skipped_steps"] = Sum(0.0 if finite else 1.0)
            counted["optim/lr"] = Max(outcome.lr)
            if allow is not None:
                counted["stability/skipped_steps"] = Sum(float(outcome.vetoed))
        return counted

    def _refuse_more_skips(self, norm: float) -> None:
        limit = self._cfg.optim.max_skipped_steps
        if self._optimizer.skipped <= limit:
            return
        self.close()
        last = checkpoints.latest(self._cfg.run_dir)
        kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        raise TooManySkips(
            f"{self._optimizer.skipped} optimizer steps had a NaN or infinite gradient (norm {norm} in the last one), "
            f"more than optim.max_skipped_steps={limit}, and were left out: {kept}. "
            "Give the same command again with a lower optim.lr; what grad/norm, ratio/max and mismatch/kl were before "
            "says more"
        )

    def _allowed(self, allow: Callable[[Mapping[str, float]], bool], mine: Metrics, norm: float) -> bool:
        """Collective: what `allow` says to the statistics of all ranks."""
        own = {**mine, "grad/norm": Mean(norm, 1.0)} if self._topo.rank == 0 else mine
        merged = metrics.merge(self._topo.gather(own))
        quantiles = metrics.quantiles(merged, "ratio/log_hist", "ratio/log")
        return allow(metrics.observed(merged) | metrics.defined(quantiles))

    def _policy_loss(self, scores: TokenScores, mb: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        return policy_loss(
            self._algo,
            logp=scores.logp,
            old_logp=scores.logp.detach() if mb.old_logp is None else mb.old_logp,
            rollout_logp=mb.rollout_logp,
            advantages=mb.advantage,
            weight=mb.weight,
            loss_mask=mb.loss_mask,
            sequence_mean=sequence_mean(mb, self._sum_over_shards if self._topo.cp * self._topo.tp > 1 else None),
            ref_logp=mb.ref_logp,
            entropy=scores.entropy,
        )

    def _sum_over_shards(self, sums: torch.Tensor) -> torch.Tensor:
        return _SumOverRanks.apply(sums, self._topo.tokens_group)

    def summary(self) -> list[str]:
        """For people, at the start: model and layout, number formats, fused kernels."""
        geometry, topo = read_geometry(self._cfg.model.path), self._topo
        count = geometry.parameters()
        cut = self._cfg.parallel.model_dump(exclude_defaults=True) | {"dp": topo.dp}
        sizes = f"{count.total / 1e6:,.2f} million parameters, {count.active / 1e6:,.2f} active"
        layout = ", ".join(f"{name} {degree}" for name, degree in cut.items())
        outside: Any = self._chunks[0].outside
        numbers = outside.precision
        fusions = Fusions.find(use_te=numbers.use_te, on_gpu=self._topo.device.type == "cuda")
        fused = "; ".join([*fusions.lines(), f"made: {self._optimizer.implementation}"])
        return [
            f"model: {geometry.model_type}, {sizes}; ranks: {topo.world_size} ({layout})",
            numbers.line(),
            fused,
        ]

    def export(self, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Collective. Full tensors under HF names, bucket by bucket, on rank 0; empty lists elsewhere."""
        return bridge.export_hf(self._chunks, self.hf_config, self._topo, bucket_bytes=bucket_bytes)

    def save_hf(self, out: Path) -> None:
        """Collective. Write an HF directory, complete or not at all."""
        bucket = int(self._cfg.rollout.publish_bucket_mb * 2**20)
        bridge.save_hf(self._chunks, self._cfg.model.path, out, self._topo, bucket_bytes=bucket)

    def save(self, run_dir: Path, trainer_state: dict[str, Any], aside: str = "") -> Path:
        """Collective. Begin the checkpoint of trainer_state["step"]; it is there after `finish_saving`.

        RUN/checkpoints/latest will name it, unless a word that is added to its name puts it `aside`. Raises
        CheckpointError if the one before failed.
        """
        state, record = checkpoint.contents(self._chunks, self._optimizer, self._topo, trainer_state)
        return self._saver.save(run_dir, trainer_state["step"], state, record, aside=aside)

    @property
    def saving_failed(self) -> bool:
        """Whether the last `save` failed, as far as this rank knows by now."""
        return self._saver.failed

    def finish_saving(self) -> None:
        """Collective. Wait for the checkpoint in flight, if any. Raises CheckpointError if it failed."""
        self._saver.finish()

    def close(self) -> None:
        """As `finish_saving`, at the end of a run that may have failed already: an error is only logged."""
        self._saver.close()

    def load(self, path: Path) -> dict[str, Any]:
        """Collective. Continue from a checkpoint of any layout; its trainer state."""
        self._saver.finish()
        return checkpoint.load(path, self._chunks, self._optimizer, self._topo, seed=self._cfg.run.seed)

    def copy_weights(self, device: torch.device | None = None) -> Weights:
        """This rank's weights as they are now, on `device` (empty: where they are)."""
        return [
            {name: p.detach().to(device or p.device, copy=True) for name, p in chunk.named_parameters()}
            for chunk in self._chunks
        ]

    @contextmanager
    def at(self, other: Weights) -> Iterator[None]:
        """Other weights inside; the optimizer does not notice."""
        mine = self.copy_weights()
        self._set_weights(other)
        try:
            yield
        finally:
            self._set_weights(mine)

    @torch.no_grad()
    def _set_weights(self, weights: Weights) -> None:
        for chunk, values in zip(self._chunks, weights, strict=True):
            for name, parameter in chunk.named_parameters():
                parameter.copy_(values[name])


class _SumOverRanks(torch.autograd.Function):
    """What each rank makes of the sum sends its gradient to all of them."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, total = group, own.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _SumOverRanks.apply(grad, ctx.group), None


def _with_logprobs(mini: MiniBatch, old: Logprobs, reference: Logprobs, routing: Routings) -> MiniBatch:
    parts = zip(mini.micro, old, reference, routing, strict=True)
    micro = tuple(mb.with_(old_logp=o, ref_logp=r, routing=z) for mb, o, r, z in parts)
    return MiniBatch(micro, mini.num_sequences, mini.num_loss_tokens)


def _supervised_loss(scores: TokenScores, mb: MicroBatch) -> tuple[torch.Tensor, Metrics]:
    nll = -torch.where(mb.loss_mask, scores.logp, 0.0)
    return (mb.weight * nll).sum(), {"loss/sft": Mean(nll.detach().sum(), mb.loss_mask.sum())}
