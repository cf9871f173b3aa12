"""The tables at the top and what is said in words: facts of each run, differing settings, stability events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from megasapo.report.blocks import Block, Part, Section, Table
from megasapo.report.read import Run

EVENTS_SHOWN = 200


def facts(runs: Sequence[Run]) -> Section:
    """What was run, in a column a run, and where the runs' settings differ."""
    head = ["", *[run.label for run in runs]]
    tables: list[Block] = []
    for title, every in (("Outcome", OUTCOME), ("Settings", FACTS)):
        rows = [[name, *[_fact(name, of, run) for run in runs]] for name, of in every.items()]
        rows = [row for row in rows if set(row[1:]) != {"-"}]
        tables.append(Table(title, "", head, rows, wide=len(runs) > 1))
    if len(runs) > 1:
        tables.append(_differences(runs))
    return Section("runs", "Run" if len(runs) == 1 else "Runs", "", [Part(tables)])


def stability(runs: Sequence[Run]) -> Section:
    """What the instability watch saw and did."""
    intro = (
        "Steps that broke a rule of the instability watch; dotted vertical lines mark them in every chart over steps."
    )
    rows = [
        [
            *([run.label] if len(runs) > 1 else []),
            *[_text(event.get(key)) for key in ("step", "metric", "value", "why", "action")],
        ]
        for run in runs
        for event in run.events
    ]
    if not rows:
        off = all(run.setting("stability.mode", "off") == "off" for run in runs)
        sentence = "the watch was off: set stability.mode to warn or act." if off else "no step broke a rule."
        return Section("stability", "Stability events", "", [Part([], [f"Events: {sentence}"])])
    head = [*(["run"] if len(runs) > 1 else []), "step", "metric", "value", "why", "action"]
    look = f"The last {EVENTS_SHOWN} of {len(rows)}." if len(rows) > EVENTS_SHOWN else ""
    return Section("stability", "Stability events", intro, [Part([Table("", look, head, rows[-EVENTS_SHOWN:])])])


def _fact(name: str, of: Callable[[Run], str], run: Run) -> str:
    return "-" if run.is_cold_start and name in OF_RL else of(run)


def _state(run: Run) -> str:
    total = run.setting("train.steps", "?")
    return f"finished at step {run.last_step}" if run.finished else f"not finished: step {run.last_step} of {total}"


def _layout(run: Run) -> str:
    sizes = [(name, run.setting(f"parallel.{name}", 1)) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")]
    cut = ", ".join(f"{name} {size}" for name, size in sizes if size != 1)
    return f"{cut or 'not cut'}; micro-batches of {run.setting('train.micro_batch_tokens')} tokens"


def _objective(run: Run) -> str:
    name = run.setting("algo.objective", "?")
    if name == "sapo":
        return f"sapo, tau {run.setting('algo.tau_pos')} / {run.setting('algo.tau_neg')} (advantage > 0 / < 0)"
    given = [
        f"{end} {run.setting(f'algo.clip_{end}')}"
        for end in ("low", "high")
        if run.setting(f"algo.clip_{end}") is not None
    ]
    return f"{name}, clip {', '.join(given) if given else 'at its own range'}"


def _batch(run: Run) -> str:
    if run.is_cold_start:
        return f"{run.setting('sft.batch_size')} demonstrations of {run.setting('sft.data')}"
    rollout = run.config.get("rollout", {})
    return (
        f"{rollout.get('prompts_per_step')} problems x {rollout.get('group_size')} responses, "
        f"{run.setting('algo.mini_batches')} optimizer steps"
    )


def _sampling(run: Run) -> str:
    rollout = run.config.get("rollout", {})
    stale = rollout.get("max_staleness", 0)
    return (
        f"{rollout.get('engine')}, temperature {rollout.get('temperature')}, at most {rollout.get('max_new_tokens')} "
        f"tokens, {f'up to {stale} versions old' if stale else 'on-policy'}"
    )


def _optimizer(run: Run) -> str:
    optim = run.config.get("optim", {})
    rate = f"lr {optim.get('lr')} {optim.get('schedule')}, {optim.get('warmup_steps')} steps of warm-up"
    return f"{rate}, clip {optim.get('clip_grad')}"


def _model(run: Run) -> str:
    return f"{run.setting('model.path')} ({run.setting('model.dtype')})"


def _diagnosed(run: Run) -> str:
    steps = [d["step"] for d in run.diagnoses]
    return f"{len(steps)}, from step {steps[0]} to {steps[-1]}" if steps else "none"


def _values(run: Run, metric: str) -> list[float]:
    return [row[metric] for row in run.rows if row.get(metric) is not None]


def _last(run: Run, metric: str) -> str:
    values = _values(run, metric)
    return f"{values[-1]:.4g}" if values else "-"


def _best_reward(run: Run) -> str:
    found = [(row["reward/mean"], row["step"]) for row in run.rows if row.get("reward/mean") is not None]
    best = max(found, default=None)
    return f"{best[0]:.4g} at step {best[1]}" if best else "-"


def _median_seconds(run: Run) -> str:
    seconds = _values(run, "time/step_s")
    return f"{median(seconds):.4g}" if seconds else "-"


FACTS: dict[str, Callable[[Run], str]] = {
    "model": _model,
    "layout": _layout,
    "objective": _objective,
    "routing replay": lambda run: str(run.setting("algo.routing_replay", "none")),
    "ratios measured from": lambda run: f"log-probabilities of the {run.setting('algo.old_logprobs', 'learner')}",
    "batch": _batch,
    "rollouts": _sampling,
    "optimizer": _optimizer,
    "seed": lambda run: str(run.setting("run.seed", "?")),
}
OF_RL = ("objective", "routing replay", "ratios measured from", "rollouts")  # what a cold start has not
OUTCOME: dict[str, Callable[[Run], str]] = {
    "state": _state,
    "directory": lambda run: str(run.path),
    "loss, last step": lambda run: _last(run, "loss/sft"),
    "reward, last step": lambda run: _last(run, "reward/mean"),
    "reward, best step": _best_reward,
    "held-out pass@1, last": lambda run: _last(run, "eval/pass@1"),
    "response length, last step": lambda run: _last(run, "response/length_mean"),
    "seconds a step, median": _median_seconds,
    "diagnosed steps": _diagnosed,
    "stability events": lambda run: str(len(run.events)),
}


def _differences(runs: Sequence[Run]) -> Table:
    flat = [_flat(run.config) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    absent = "(not set)"
    rows = [
        [name, *[_text(settings.get(name, absent)) for settings in flat]]
        for name in names
        if len({repr(settings.get(name, absent)) for settings in flat}) > 1 and name != "run.name"
    ]
    look = "Every setting of config.yaml that is not the same in all runs." if rows else "All settings are the same."
    return Table("Settings that differ", look, ["setting", *[run.label for run in runs]] if rows else [], rows)


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "-" if value is None else str(value)
