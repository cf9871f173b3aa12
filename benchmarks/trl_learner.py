"""TRL's GRPOTrainer as the other side of learner_step.py: its own training loop on given tokens, with clocks in it.

Nothing that it computes is changed: a subclass reads clocks around what the trainer calls, tokens and rewards come in
through its own `rollout_func` and reward functions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.learner_work import BETAS, CLIP, EPS, GROUP, LR, MINI_BATCHES, Work, peak_memory_mib
from benchmarks.measure import Seconds, now
from benchmarks.turns import Turns


class Finished(Exception):
    """There are no more turns: leaves the trainer's loop."""


class Clocks(TrainerCallback):
    """Adds up the learner's part of a batch: old logprobs, and from a prepared micro-batch to the optimizer's step."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.clock = self.cpu = 0.0
        self.steps = 0
        self._since: Seconds | None = None
        self.order: list[torch.Tensor] = []  # completions of each micro-batch, padded
        self.old_logp = 0.0
        self.grad_norms: list[float] = []

    def start(self) -> None:
        if self._since is None:
            self._since = now()

    def stop(self) -> None:
        assert self._since is not None, "the clock was not started"
        spent = now().since(self._since)
        self.clock += spent.clock
        self.cpu += spent.cpu
        self._since = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stop()
        self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "grad_norm" in logs:
            self.grad_norms.append(float(logs["grad_norm"]))


class ClockedTrainer(GRPOTrainer):
    clocks: Clocks

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Any, attention_mask: Any, keep: int, **kw: Any):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, keep, **kw)
        self.clocks.start()
        out = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, keep, **kw)
        self.clocks.stop()
        self.clocks.old_logp = float((out[0] * attention_mask[:, -keep:]).sum() / attention_mask[:, -keep:].sum())
        return out

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        self.clocks.order.append(inputs["completion_ids"])
        self.clocks.start()
        return inputs


def take_turns(turns: Turns, work: Work) -> None:
    """Train until there are no more turns; one turn is one batch with its optimizer steps."""
    batches = 0
    clocks = Clocks()

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        nonlocal batches, clocks
        if batches:
            assert clocks.steps == MINI_BATCHES, f"{clocks.steps} optimizer steps in a batch of {MINI_BATCHES}"
            turns.done({
                "seconds": Seconds(clocks.clock, clocks.cpu), "memory_mib": peak_memory_mib(),
                "order": _order(clocks.order, work), "old_logp": clocks.old_logp,
                "grad_norm": sum(clocks.grad_norms) / len(clocks.grad_norms),
            })  # fmt: skip
        if turns.wait() is None:
            raise Finished
        batches += 1
        clocks.reset()
        return {"prompt_ids": work.prompts, "completion_ids": work.responses, "logprobs": None}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return work.rewards

    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(
            ClockedTrainer, work.model, work.dtype, directory, reward, prompts=["x"] * 10_000,
            rollout_func=rollout, per_device_train_batch_size=work.micro_batch_sequences,
            gradient_accumulation_steps=len(work.prompts) // MINI_BATCHES // work.micro_batch_sequences,
            steps_per_generation=len(work.prompts) // work.micro_batch_sequences,
        )  # fmt: skip
        trainer.clocks = clocks
        trainer.add_callback(clocks)
        try:
            trainer.train()
        except Finished:
            pass
        else:
            raise RuntimeError("TRL's trainer ended before the turns did")


def make_trainer(
    kind: type[GRPOTrainer], model: str, dtype: str, directory: str, reward: Any, prompts: list[str],
    rollout_func: Any = None, end_tokens: Sequence[int] = (), **settings: Any,
) -> GRPOTrainer:  # fmt: skip
    """SAPO, no recompute, no KL, fp32 or bf16 autocast, and the optimizer settings that both sides share.

    `end_tokens` end a response beside the tokenizer's own end-of-sequence token.
    """
    on_gpu = torch.cuda.is_available()
    config = GRPOConfig(
        output_dir=directory, loss_type="sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, beta=0.0,
        num_generations=GROUP, temperature=1.0, learning_rate=LR, lr_scheduler_type="constant", adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], adam_epsilon=EPS, weight_decay=0.0, max_grad_norm=CLIP, bf16=dtype == "bfloat16",
        gradient_checkpointing=False, use_cpu=not on_gpu, max_steps=1_000_000, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, seed=1, **settings,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network.generation_config.eos_token_id = [tokenizer.eos_token_id, *end_tokens]
    trainer = kind(
        model=network,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        rollout_func=rollout_func,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _order(micro: list[torch.Tensor], work: Work) -> list[int]:
    """Which of the batch's sequences each row of the micro-batches is."""
    known = {tuple(response): i for i, response in enumerate(work.responses)}
    order = []
    for row in torch.cat(micro).tolist():
        matches = [i for response, i in known.items() if tuple(row[: len(response)]) == response]
        assert len(matches) == 1, f"{len(matches)} responses begin as a row of TRL's batch does"
        order += matches
    return order
