"""Which of a step's metrics are out of line: thresholds and robust z-scores over the steps before. Pure Python.

Called by guard.py with metrics that are equal on all ranks, so every rank comes to the same events without asking the
others. It must not do anything about them.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megasapo.sections import Action, StabilityConfig, StabilityRule

MAD_TO_SIGMA = 1.4826  # of a normal distribution
RELATIVE_FLOOR = 0.05  # of the median
ABSOLUTE_FLOOR = 1e-4

DEFAULT_RULES = (
    StabilityRule(metric="ratio/log_var", z=8.0),
    StabilityRule(metric="ratio/ess", z=6.0, side="low"),
    StabilityRule(metric="sapo/gate_mean_pos", z=6.0, side="low"),
    StabilityRule(metric="sapo/gate_mean_neg", z=6.0, side="low"),
    StabilityRule(metric="entropy/mean", z=6.0, side="both"),
    StabilityRule(metric="grad/norm", z=8.0),
    StabilityRule(metric="grad/skipped_steps", above=0.0),
    StabilityRule(metric="reward/mean", z=6.0, side="low"),
    StabilityRule(metric="routing/flip_rate_drift", z=6.0),
    StabilityRule(metric="routing/flip_rate_mismatch", z=6.0),
)


@dataclass(frozen=True, slots=True)
class Event:
    """A rule has fired."""

    step: int
    metric: str
    value: float
    why: str  # a sentence with the numbers
    rule: StabilityRule
    action: Action  # what is done: the rule's, or warn under stability.mode=warn

    def row(self) -> dict[str, Any]:
        """JSON values; a value that JSON cannot say is null."""
        return {
            "step": self.step,
            "metric": self.metric,
            "value": self.value if math.isfinite(self.value) else None,
            "why": self.why,
            "action": self.action,
            "rule": self.rule.model_dump(mode="json", exclude_defaults=True),
        }


def robust_z(value: float, history: Iterable[float]) -> float:
    """(value - median) / scale over a history of at least one finite value.

    scale = max(1.4826 MAD, 5 % of |median|, 1e-4). The floors are for histories that hardly vary, such as a ratio's
    variance of exactly 0 or a reward of 1 at every step: a deviation of a few per cent is nothing to act on there.
    """
    past = list(history)
    median = statistics.median(past)
    mad = statistics.median(abs(x - median) for x in past)
    return (value - median) / max(MAD_TO_SIGMA * mad, RELATIVE_FLOOR * abs(median), ABSOLUTE_FLOOR)


class Watch:
    """Judges one step after the other by a set of rules."""

    def __init__(self, cfg: StabilityConfig, rules: Iterable[StabilityRule] | None = None) -> None:
        """`rules`: instead of the configuration's (or the default ones)."""
        self._cfg = cfg
        self._rules: dict[str, list[StabilityRule]] = {}  # by metric
        for rule in rules if rules is not None else cfg.rules if cfg.rules is not None else DEFAULT_RULES:
            self._rules.setdefault(rule.metric, []).append(rule)
        self._missed = dict.fromkeys(self._rules, 0)  # steps of this process without the metric, until it comes
        self._seen: set[str] = set()
        self._history: dict[str, deque[float]] = {m: deque(maxlen=cfg.window) for m in self._rules}
        self._in_a_row: dict[str, int] = {}  # by rule: steps that broke it
        self._outliers: dict[str, int] = {}  # by metric: steps in a row that were kept out of its history

    def observe(self, step: int, scalars: Mapping[str, float]) -> list[Event]:
        """The events of a step. A metric that the step lacks is not judged and breaks no row of `patience`.

        Values that break a rule do not enter the history that later ones are compared with, unless there are `window`
        of them in a row: then that is the new level, and its history begins anew.
        """
        events = []
        for metric, rules in self._rules.items():
            if metric not in scalars:
                self._missed[metric] += 1
                continue
            self._seen.add(metric)
            value = scalars[metric]
            reasons = [(rule, self._reason(rule, value)) for rule in rules]
            events += [e for rule, why in reasons if (e := self._event(step, rule, value, why)) is not None]
            self._remember(metric, value, is_outlier=any(why for _, why in reasons))
        return events

    def never_seen(self) -> list[str]:
        """At the step when they should long have come: metrics that never did. Each once after a start or a resume."""
        due = self._cfg.warmup + self._cfg.window
        return [metric for metric, missed in self._missed.items() if missed == due and metric not in self._seen]

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as JSON values."""
        return {
            "seen": sorted(self._seen),
            "history": {metric: list(values) for metric, values in self._history.items() if values},
            "in_a_row": dict(self._in_a_row),
            "outliers": dict(self._outliers),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as the watch whose `state` it is would have; what it knew of metrics without a rule now is dropped."""
        self._seen = set(state["seen"])
        for metric, values in self._history.items():
            values.clear()
            values.extend(state["history"].get(metric, ()))
        self._in_a_row = dict(state["in_a_row"])
        self._outliers = dict(state["outliers"])

    def _reason(self, rule: StabilityRule, value: float) -> str | None:
        """Why the value breaks the rule, or None."""
        if not math.isfinite(value):
            return f"{rule.metric} is {value}"
        if rule.above is not None and value > rule.above:
            return f"{rule.metric} = {value:.4g} is above {rule.above:g}"
        if rule.below is not None and value < rule.below:
            return f"{rule.metric} = {value:.4g} is below {rule.below:g}"
        past = self._history[rule.metric]
        if rule.z is None or len(past) < self._cfg.warmup:
            return None
        z = robust_z(value, past)
        if {"high": z, "low": -z, "both": abs(z)}[rule.side] <= rule.z:
            return None
        middle = statistics.median(past)
        return f"{rule.metric} = {value:.4g} has z = {z:.1f} (limit {rule.z:g}) against a median of {middle:.4g}"

    def _event(self, step: int, rule: StabilityRule, value: float, why: str | None) -> Event | None:
        key = rule.model_dump_json(exclude_defaults=True)
        row = self._in_a_row.pop(key, 0) + 1
        if why is None:
            return None
        if row < rule.patience:
            self._in_a_row[key] = row
            return None
        if rule.patience > 1:
            why += f", at {rule.patience} steps in a row"
        action: Action = rule.action if self._cfg.mode == "act" else "warn"
        return Event(step, rule.metric, value, why, rule, action)

    def _remember(self, metric: str, value: float, *, is_outlier: bool) -> None:
        if not is_outlier:
            self._outliers.pop(metric, None)
            self._history[metric].append(value)
            return
        row = self._outliers.pop(metric, 0) + 1
        if row < self._cfg.window:
            self._outliers[metric] = row
        else:
            self._history[metric].clear()
