"""TRL's GRPOTrainer as the other side of rl_step.py: its own loop, generation included, with a clock between steps.

Nothing that it computes is changed; a subclass looks at the clock around its generation.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from trl import GRPOTrainer

from benchmarks.learner_work import GROUP, peak_memory_mib
from benchmarks.measure import Seconds, now
from benchmarks.trl_learner import Finished, make_trainer
from benchmarks.turns import Turns

if TYPE_CHECKING:
    from benchmarks.rl_step import Task


class Clock(TrainerCallback):
    """One turn from the request for a batch to the end of its optimizer step."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._since = Seconds(0.0, 0.0)
        self.generate_s = 0.0
        self.tokens = 0

    def begin(self) -> None:
        if self._turns.wait() is None:
            raise Finished
        self._since = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._turns.done({
            "seconds": now().since(self._since),
            "generate_s": self.generate_s,
            "tokens": self.tokens,
            "memory_mib": peak_memory_mib(),
        })  # fmt: skip


class ClockedTrainer(GRPOTrainer):
    clock: Clock

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        self.clock.begin()
        return super()._prepare_inputs(generation_batch)

    def _generate(self, prompts: list[Any]) -> Any:
        start = time.perf_counter()
        out = super()._generate(prompts)
        self.clock.generate_s = time.perf_counter() - start
        self.clock.tokens = sum(map(len, out[1]))
        return out


def take_turns(turns: Turns, task: Task, pattern: str) -> None:
    """Train until there are no more turns; one turn is one step."""
    prompts = [json.loads(line)["prompt"] for line in Path(task.data).read_text().splitlines()]

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(re.search(pattern, text) is not None) for text in completions]

    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(
            ClockedTrainer, task.model, task.dtype, directory, reward, prompts, end_tokens=task.end_tokens,
            per_device_train_batch_size=task.prompts * GROUP, max_completion_length=task.max_new_tokens,
            shuffle_dataset=False,
        )  # fmt: skip
        trainer.clock = Clock(turns)
        trainer.add_callback(trainer.clock)
        try:
            trainer.train()
        except Finished:
            return
        raise RuntimeError("TRL's trainer ended before the turns did")
