"""What is done about the watch's events: warnings, dumps, steps left out, roll-backs, the end of the run.

Called by train.py on every rank with figures that are equal on all of them. It decides and writes RUN/events.jsonl and
RUN/dumps; going back itself is train.py's, which has the weights, the data and the servers.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megasapo import jsonl
from megasapo.errors import UserError
from megasapo.log.rollouts import write_rollouts
from megasapo.log.sinks import ROLLED_BACK
from megasapo.routing.validate import smallest
from megasapo.sections import StabilityConfig
from megasapo.stability.watch import DEFAULT_RULES, Event, Watch
from megasapo.types import Group, Ranks

log = logging.getLogger(__name__)
EVENTS = "events.jsonl"


class Unstable(UserError, RuntimeError):
    """The rules of `stability` end the run; the message names the rule, the values and what is left of it."""


class Guard:
    """The watch of one run. `observe` after every step, then `act`; `allow` goes to Policy.update."""

    def __init__(self, cfg: StabilityConfig, ranks: Ranks, run_dir: Path) -> None:
        self._cfg, self._ranks, self._run_dir = cfg, ranks, run_dir
        rules = [] if cfg.mode == "off" else list(DEFAULT_RULES if cfg.rules is None else cfg.rules)
        acts = cfg.mode == "act"
        self._skip_rules = [rule for rule in rules if acts and rule.action == "skip"]
        self._step_rules = [rule for rule in rules if rule not in self._skip_rules]
        self._restore(0, None)
        self._vetoes: list[Event] = []  # of the step under way
        self._longest_skip = 0  # of the rows that had a part in this step
        self.rollbacks = 0
        self.may_roll_back = acts and any(rule.action == "rollback" for rule in rules)

    # --- over restarts ---

    def begin(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Start after `step`, from a checkpoint's state if there is one; what the files say beyond it is cut."""
        self.rollbacks = int(state["rollbacks"]) if state is not None else 0
        self._restore(step, state)
        if self._ranks.rank == 0:
            now = (self.rollbacks, step)
            jsonl.keep(self._run_dir / EVENTS, lambda row: (row["rollbacks"], row["step"]) <= now)
            jsonl.keep(self._run_dir / ROLLED_BACK, lambda row: row["rollback"] <= self.rollbacks)

    def rolled_back(self, step: int, state: Mapping[str, Any] | None) -> None:
        """The run is at `step` again; `state` is what the watch knew then."""
        self.rollbacks += 1
        self._restore(step, state)

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "watch": self._watch.state(),
            "mini": {str(i): watch.state() for i, watch in self._mini.items()},
            "skips_in_a_row": self._skips_in_a_row,
            "rollbacks": self.rollbacks,
        }

    def _restore(self, step: int, state: Mapping[str, Any] | None) -> None:
        """None: of a checkpoint from before there was a watch."""
        self._step, self._skips_in_a_row = step, 0
        self._watch = Watch(self._cfg, self._step_rules)
        # Ratios grow from one mini-batch of a step to the next: each place in the step has a history of its own.
        self._mini: dict[int, Watch] = {}
        if state is None:
            return
        self._skips_in_a_row = int(state["skips_in_a_row"])
        self._watch.restore(state["watch"])
        for i, known in state["mini"].items():
            self._mini[int(i)] = Watch(self._cfg, self._skip_rules)
            self._mini[int(i)].restore(known)

    # --- before the optimizer step ---

    @property
    def allow(self) -> Callable[[int, Mapping[str, float]], bool] | None:
        """For Policy.update; None when no rule may skip, so that nothing has to be gathered for it."""
        return self._allow if self._skip_rules else None

    def _allow(self, mini_batch: int, figures: Mapping[str, float]) -> bool:
        watch = self._mini.setdefault(mini_batch, Watch(self._cfg, self._skip_rules))
        events = watch.observe(self._step + 1, figures)
        self._vetoes += events
        self._skips_in_a_row = self._skips_in_a_row + 1 if events else 0
        self._longest_skip = max(self._longest_skip, self._skips_in_a_row)
        return not events

    # --- after the step ---

    def observe(self, step: int, figures: Mapping[str, float]) -> list[Event]:
        """The events of a step, those that left out optimizer steps included; warned of, and in RUN/events.jsonl."""
        vetoes, self._vetoes, self._step = self._vetoes, [], step
        events = vetoes + self._watch.observe(step, figures)
        if self._ranks.rank == 0:
            for event in events:
                log.warning("step %d: %s: %s", step, event.why, event.action)
                jsonl.append(self._run_dir / EVENTS, [{"rollbacks": self.rollbacks} | event.row()])
            watches = [self._watch, *self._mini.values()]
            missing = sorted({metric for watch in watches for metric in watch.never_seen()})
            if self._cfg.rules is not None and missing:
                log.warning("stability.rules: no step has had %s: is the name right, and is it measured?", missing)
        return events

    def act(self, step: int, events: Sequence[Event], groups: Sequence[Group], figures: Mapping[str, float]) -> bool:
        """Dump if an event says so, and say whether to go back to the last checkpoint. Collective.

        Raises Unstable, on every rank, when the run has to end.
        """
        wanted = {event.action: event for event in reversed(events)}  # of several the first is named
        kept = self._dump(step, events, groups, figures) if wanted.keys() & {"dump", "rollback", "stop"} else None
        reason = None
        if "stop" in wanted:
            reason = wanted["stop"].why
        elif "rollback" in wanted and self.rollbacks >= self._cfg.max_rollbacks:
            reason = f"{wanted['rollback'].why}, after stability.max_rollbacks={self._cfg.max_rollbacks} roll-backs"
        elif self._longest_skip > self._cfg.max_skips_in_a_row:
            skips = f"stability.max_skips_in_a_row={self._cfg.max_skips_in_a_row}"
            reason = f"more optimizer steps than {skips} were left out one after another"
            reason += f", the last because {wanted['skip'].why}" if "skip" in wanted else ""
        self._longest_skip = 0
        if reason is not None:
            raise Unstable(
                f"step {step}: {reason}. The checkpoints in {self._run_dir / 'checkpoints'} are from before it"
                f"{f', the batch of this step is in {kept}' if kept else ''}; lower optim.lr, or look at the steps "
                "before in TensorBoard, or change the rule: the same command continues from the last checkpoint"
            )
        return "rollback" in wanted

    def _dump(self, step: int, events: Sequence[Event], groups: Sequence[Group], figures: Mapping[str, float]) -> Path:
        """RUN/dumps/step_X, complete or absent: rollouts/, routing/, metrics.json, events.json. Collective."""
        again = f".after_rollback_{self.rollbacks}" if self.rollbacks else ""
        final = self._run_dir / "dumps" / f"step_{step:08d}{again}"
        temporary = final.with_name(final.name + ".tmp")
        if self._ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._ranks.barrier()
        if self._ranks.is_leader:
            write_rollouts(temporary, step, groups, shard=(self._ranks.dp_rank, self._ranks.dp))
            _write_routing(temporary, step, groups, self._ranks)
        if self._ranks.rank == 0:
            numbers = {name: x if np.isfinite(x) else None for name, x in figures.items()}
            (temporary / "metrics.json").write_text(json.dumps({"step": step} | numbers, indent=1))
            (temporary / "events.json").write_text(json.dumps([event.row() for event in events], indent=1))
        self._ranks.barrier()
        if self._ranks.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        return final


def _write_routing(directory: Path, step: int, groups: Sequence[Group], ranks: Ranks) -> None:
    """routing/step_X[.part-I-of-N].npz: of each sample for which the server returned it, under "uid.index"."""
    found = {
        f"{group.uid}.{i}": smallest(sample.completion.routed_experts)
        for group in groups
        for i, sample in enumerate(group.samples)
        if sample.completion.routed_experts is not None
    }
    if not found:
        return
    part = "" if ranks.dp == 1 else f".part-{ranks.dp_rank}-of-{ranks.dp}"
    (directory / "routing").mkdir(exist_ok=True)
    np.savez_compressed(directory / "routing" / f"step_{step:08d}{part}.npz", **found)  # type: ignore[arg-type]
