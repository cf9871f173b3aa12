"""Where the seconds of a step go."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from megasapo.report.blocks import Chart, Section
from megasapo.report.curves import Curve, curve_part
from megasapo.report.figures import (
    RUN_COLOURS,
    STEP,
    Figure,
    Points,
    Series,
    bars,
    figure_of,
    label,
    line,
    mark_events,
    metric,
)
from megasapo.report.read import Run

NAMES = {  # phase: what the reader calls it, in the order of the loop
    "rollout": "rollout",
    "batch": "batch",
    "old_logprobs": "old log-probabilities",
    "update": "update",
    "publish": "publish",
    "diagnose": "diagnosis",
    "evaluate": "evaluation",
    "save": "checkpoint",
}
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#5B4B8A", "#D55E00", "#4d7a8c", "#b4bac3")
THROUGHPUT = Curve(
    "Throughput",
    "Tokens of prompts and responses in a batch over the seconds of its step.",
    "tokens per second",
    (Series("tokens/s", metric("perf/tokens_per_s")),),
    "not logged.",
)


def phases(runs: Sequence[Run]) -> Section:
    """One run: seconds by phase over steps. Several: their median step."""
    part = curve_part(runs, [THROUGHPUT])
    if not any(_names(run) for run in runs):
        part.missing.append("Phases: these runs logged no time/<phase>_s.")
    elif len(runs) == 1:
        part.blocks.insert(0, Chart(
            "Seconds of a step by phase",
            "The widest band is what to speed up: rollout with more servers or staleness, update with a better layout.",
            mark_events(_over_steps(runs[0]), runs),
        ))  # fmt: skip
    else:
        look = "Medians over steps: where one run spends longer than another."
        part.blocks.insert(0, Chart("Seconds of a step by phase, median", look, _medians(runs)))
    return Section("time", "Time", "", [part])


def _names(run: Run) -> list[str]:
    logged = {
        name.removeprefix("time/").removesuffix("_s") for row in run.rows for name in row if name.startswith("time/")
    }
    logged.discard("step")
    return [name for name in NAMES if name in logged] + sorted(logged - NAMES.keys())


def _seconds(run: Run) -> dict[str, Points]:
    """Of every phase at every step, 0 where a step did not have it, and the rest of the step."""
    steps = [row["step"] for row in run.rows]
    found = {name: [row.get(f"time/{name}_s") or 0.0 for row in run.rows] for name in _names(run)}
    known = [sum(values[i] for values in found.values()) for i in range(len(steps))]
    found["other"] = [max(0.0, (row.get("time/step_s") or k) - k) for row, k in zip(run.rows, known, strict=True)]
    return {NAMES.get(name, name): (steps, values) for name, values in found.items()}


def _over_steps(run: Run) -> Figure:
    data = []
    for (name, (steps, values)), colour in zip(_seconds(run).items(), _colours()):
        trace = bars(steps, values, name, colour, "%{y:.3~g} s")
        if len(steps) > 150:  # bars would be thinner than a pixel or two
            trace = line(steps, trace["y"], name, colour) | {"mode": "lines", "stackgroup": "all", "fillcolor": colour}
            trace |= {"line": {"width": 0, "color": colour}, "hovertemplate": "%{y:.3~g} s"}
        data.append(trace)
    return figure_of(data, x=STEP, y="seconds", barmode="stack", bargap=0.08)


def _medians(runs: Sequence[Run]) -> Figure:
    found = [_seconds(run) for run in runs]
    names = list(dict.fromkeys(name for seconds in found for name in seconds))
    data = []
    for name, colour in zip(names, _colours()):
        values = [median(y or 0.0 for y in seconds[name][1]) if name in seconds else 0.0 for seconds in found]
        trace = bars(values, [], name, colour, "%{x:.3~g} s", orientation="h")
        data.append(trace | {"y": [label(run.label) for run in runs]})
    height = 190 + 42 * len(runs)
    figure = figure_of(data, x="seconds", y="", barmode="stack", hovermode="y unified", height=height)
    figure["layout"]["yaxis"] |= {"type": "category", "autorange": "reversed"}
    return figure


def _colours() -> list[str]:
    return [*COLOURS, *RUN_COLOURS, *COLOURS]
