"""Charts as plain dictionaries in plotly's format: one look, and few shapes of chart.

Called by the parts of the report; knows nothing of runs' files. Text from data is escaped here, because plotly reads
labels as markup.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megasapo.report.read import Run

Figure = dict[str, Any]
Points = tuple[list[float], list[float | None]]  # steps, values

# Okabe and Ito's palette, told apart by colour-blind readers, without its yellow, which is too pale for lines
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5B4B8A", "#7F7F7F")
TERM_COLOURS = {
    "engine": "#8A8F98",
    "fp8": "#009E73",  # only of a learner that quantises
    "mismatch": "#E69F00",
    "update": "#0072B2",
    "drift": "#CC79A7",
}
DASHES = ("solid", "dot", "dash", "dashdot")
INK, GRID, AXIS = "#1f2933", "#e8eaee", "#aeb4bd"
STEP = "step"
MARKERS_UP_TO = 40  # points; more would hide the line


@dataclass(frozen=True)
class Series:
    """One quantity over steps: its name in the legend, and where a run has it."""

    label: str
    points: Callable[[Run], Points]
    colour: str | None = None


def metric(name: str) -> Callable[[Run], Points]:
    """Of metrics.jsonl; steps without it, or with NaN, are left out."""

    def points(run: Run) -> Points:
        found = [(row["step"], row[name]) for row in run.rows if row.get(name) is not None]
        return [step for step, _ in found], rounded([value for _, value in found])

    return points


def diagnosed(value: Callable[[dict[str, Any]], float | None]) -> Callable[[Run], Points]:
    """A figure of every diagnosed step."""

    def points(run: Run) -> Points:
        found = [(d["step"], value(d)) for d in run.diagnoses]
        kept = [(step, x) for step, x in found if x is not None]
        return [step for step, _ in kept], rounded([x for _, x in kept])

    return points


def curves(runs: Sequence[Run], series: Sequence[Series], *, y: str, log: bool = False, unit: bool = False) -> Figure:
    """Lines over steps. One run: a colour a series. Several: a colour a run, as in the page's legend, a dash a series.

    `log`: a logarithmic axis where values are positive and span more than a decade and a half. `unit`: shares, in
    percent. Without any point the figure has no traces.
    """
    data = []
    for i, run in enumerate(runs):
        for j, s in enumerate(series):
            steps, values = s.points(run)
            if not steps:
                continue
            colour = RUN_COLOURS[i % len(RUN_COLOURS)] if len(runs) > 1 else s.colour or RUN_COLOURS[j]
            name = s.label if len(runs) == 1 else run.label if len(series) == 1 else f"{run.label}, {s.label}"
            trace = line(steps, values, name, colour, DASHES[j % len(DASHES)] if len(runs) > 1 else "solid")
            trace |= {"meta": {"run": i}, "showlegend": len(runs) == 1 and len(series) > 1}
            trace["hovertemplate"] = "%{y:.3~%}" if unit else "%{y:.4~g}"
            data.append(trace)
    known = [value for trace in data for value in trace["y"] if value is not None]
    if data and len(runs) > 1 and len(series) > 1:
        data += _dash_legend([s.label for s in series])
    figure = figure_of(data, x=STEP, y=y, percent=unit)
    if all(value >= 0 for value in known):
        figure["layout"]["yaxis"]["rangemode"] = "nonnegative"
    if log and not unit and known and max(known) > 30 * min(known) > 0:
        figure["layout"]["yaxis"] |= {"type": "log", "dtick": 1}
    return figure


def _dash_legend(labels: Sequence[str]) -> list[Figure]:
    return [
        line([None], [None], label, "#5f6773", DASHES[j % len(DASHES)]) | {"showlegend": True, "hoverinfo": "skip"}
        for j, label in enumerate(labels)
    ]


def line(xs: Sequence[Any], ys: Sequence[Any], name: str, colour: str, dash: str = "solid") -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(xs) <= MARKERS_UP_TO else "lines",
        "x": list(xs),
        "y": list(ys),
        "name": label(name),
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"size": 5},
    }


def bars(xs: Sequence[Any], ys: Sequence[Any], name: str, colour: str, hover: str, **more: Any) -> Figure:
    return {
        "type": "bar",
        "x": list(xs),
        "y": rounded(ys),
        "name": label(name),
        "marker": {"color": colour, "line": {"width": 0}},
        "hovertemplate": hover,
        **more,
    }


def heat_map(
    columns: Sequence[Any], rows: Sequence[Any], z: Sequence[Sequence[float | None]], *, bar: str, **more: Any
) -> Figure:
    """One heat map trace; columns and rows are names, so that uneven steps get cells of one width."""
    return {
        "type": "heatmap",
        "x": [str(c) for c in columns],
        "y": [str(r) for r in rows],
        "z": [rounded(line) for line in z],
        "colorbar": {"title": {"text": bar, "side": "right", "font": {"size": 13}}, "thickness": 14, "outlinewidth": 0},
        **more,
    }


def figure_of(data: list[Figure], *, x: str, y: str, names: bool = False, percent: bool = False, **more: Any) -> Figure:
    """Traces on the page's one look; `names`: x is an axis of names, `percent`: y is a share; `more` of the layout."""
    layout = {
        "height": 330,
        "margin": {"l": 64, "r": 18, "t": 34, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "#ffffff",
        "font": {
            "family": "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
            "size": 13,
            "color": INK,
        },
        "xaxis": _axis(x) | ({"type": "category"} if names else {}),
        "yaxis": _axis(y) | ({"tickformat": ",~%"} if percent else {}),
        "hovermode": "x unified",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#b4bac3", "activecolor": INK},
        "legend": {
            "orientation": "h",
            **{"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "traceorder": "normal",
        },
    }
    return {"data": data, "layout": layout | more}


def _axis(title: str) -> Figure:
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 13}},
        "gridcolor": GRID,
        "linecolor": AXIS,
        "showline": True,
        "zeroline": False,
        "automargin": True,
        "exponentformat": "e",
        "minexponent": 5,
    }


def categories(figure: Figure, *, rows: int) -> Figure:
    """Make both axes of a heat map's figure axes of names, and as high as its rows need."""
    figure["layout"] |= {"height": min(820, max(230, 130 + 15 * rows)), "hovermode": "closest"}
    for axis in ("xaxis", "yaxis"):
        figure["layout"][axis] |= {"type": "category", "showgrid": False, "showline": False, "ticks": "", "nticks": 33}
    figure["layout"]["xaxis"]["tickangle"] = 0
    return figure


def mark_events(figure: Figure, runs: Sequence[Run]) -> Figure:
    """Dotted vertical lines at the steps that the instability watch named; none where steps are names, not numbers."""
    if figure["layout"]["xaxis"].get("type") == "category":
        return figure
    marks = {i: sorted({event["step"] for event in run.events}) for i, run in enumerate(runs) if run.events}
    figure["layout"]["shapes"] = [
        {
            "type": "path",  # one of all steps: thousands of shapes would make a page that no browser scrolls
            "path": "".join(f"M{step},0V1" for step in steps),
            "yref": "paper",
            "layer": "below",
            "line": {
                "color": RUN_COLOURS[i % len(RUN_COLOURS)] if len(runs) > 1 else "#c0392b",
                "width": 1,
                "dash": "dot",
            },
        }
        for i, steps in marks.items()
    ]
    return figure


def label(text: str) -> str:
    """Text from data as plotly's labels take it: they read a subset of HTML."""
    return html.escape(text, quote=False)


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Six significant digits, which is more than a chart shows; NaN and infinities as None."""
    return [None if v is None or not math.isfinite(v) else float(f"{v:.6g}") for v in values]
