"""Who does the work: expert load by layer, its evenness over steps, and the experts whose flips cost most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megasapo.report.blocks import Chart, Part, Section, Table
from megasapo.report.curves import NO_DIAGNOSIS, Curve, curve_part
from megasapo.report.figures import Figure, Series, categories, diagnosed, figure_of, heat_map
from megasapo.report.ratios import SEQUENTIAL, mean, product
from megasapo.report.read import Run

COSTLIEST = 10
WHO = {"rollout": "rollout server", "behaviour": "learner before the update", "current": "learner after it"}


def experts(runs: Sequence[Run]) -> Section:
    """Evenness of all runs, then maps of each diagnosed one."""
    intro = "Which experts get the tokens, as the rollout server and as the learner route them."
    if not any(run.diagnoses for run in runs):
        return Section("experts", "Experts", intro, [Part([], [f"Expert load: {NO_DIAGNOSIS}"])])
    parts = [Part([_load(run.diagnoses[-1]), _flips(run.diagnoses[-1]), _costliest(run.diagnoses[-1])], run=i)
             for i, run in enumerate(runs) if run.diagnoses]  # fmt: skip
    return Section("experts", "Experts", intro, [curve_part(runs, EVENNESS), *parts])


def _load(diagnosis: dict[str, Any]) -> Chart:
    loads = diagnosis["experts"]["load"]
    num_experts = len(loads["current"][0])
    top = max([2.0, *(x * num_experts for load in loads.values() for row in load for x in row if x is not None)])
    even = 1 / top  # where an even share lies on the colour bar
    scale = [[0, "#0072B2"], [even, "#fbfbfd"], [even + (1 - even) / 2, "#e0853d"], [1, "#a33600"]]
    traces = [
        _map(diagnosis, [[product(x, num_experts) for x in row] for row in loads[who]], "times an even share", WHO[who])
        | {"colorscale": scale, "zmin": 0, "zmax": top}
        for who in ("current", "behaviour", "rollout")
    ]
    for trace in traces:
        trace["hovertemplate"] = "layer %{y}, expert %{x}: %{z:.3~g} times an even share<extra></extra>"
    look = (
        "White is an even share, red an expert with more, blue with less. A row of one red cell is a collapsed router."
    )
    return Chart("Expert load", look, _switched(traces, diagnosis), wide=True, note=_when(diagnosis))


def _flips(diagnosis: dict[str, Any]) -> Chart:
    of = diagnosis["experts"]["flips"]
    top = max([1e-9, *(x for rows in of.values() for row in rows for x in row if x is not None)])
    names = {"drift": "by the update (drift)", "mismatch": "between engines (mismatch)"}
    traces = [
        _map(diagnosis, of[term], "share of the tokens", names[term])
        | {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": top}
        for term in names
    ]
    for trace in traces:
        trace["colorbar"]["tickformat"] = ".2~%"
        trace["hovertemplate"] = "layer %{y}, expert %{x}: came or went for %{z:.3~%} of the tokens<extra></extra>"
    look = "Share of the tokens for which this expert came or went. Pairs of dark cells in a row are experts that tie."
    return Chart("Experts that flip", look, _switched(traces, diagnosis), wide=True, note=_when(diagnosis))


def _costliest(diagnosis: dict[str, Any]) -> Table:
    of = diagnosis["experts"]
    found = [
        (share, term, layer, expert, of["flips"][term][i][expert], of["load"]["current"][i][expert])
        for term in ("mismatch", "drift")
        for i, layer in enumerate(diagnosis["layers"])
        for expert, share in enumerate(of["share"][term][i])
        if share is not None and of["flips"][term][i][expert]
    ]
    found.sort(key=lambda row: -row[0])
    rows = [
        [str(layer), str(expert), term, f"{share:.2%}", _percent(flips), _percent(load)]
        for share, term, layer, expert, flips, load in found[:COSTLIEST]
    ]
    look = "Share of the variance on tokens where this expert came or went. A token may count for several experts."
    head = ["layer", "expert", "term", "share of Var(d)", "tokens it flipped on", "load"]
    return Table(f"Experts whose flips cost most (step {diagnosis['step']})", look, head, rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _map(diagnosis: dict[str, Any], z: list[list[float | None]], bar: str, name: str) -> Figure:
    return heat_map(range(len(z[0])), diagnosis["layers"], z, bar=bar, name=name)


def _switched(traces: list[Figure], diagnosis: dict[str, Any]) -> Figure:
    """One map at a time, chosen by buttons above."""
    for i, trace in enumerate(traces):
        trace["visible"] = i == 0
    buttons = [
        {"label": trace["name"], "method": "update", "args": [{"visible": [j == i for j in range(len(traces))]}]}
        for i, trace in enumerate(traces)
    ]
    menu = {
        "type": "buttons",
        "direction": "right",
        **{"x": 0, "xanchor": "left", "y": 1.03, "yanchor": "bottom"},
        **{"bgcolor": "#f3f4f6", "bordercolor": "#d4d8de", "font": {"size": 12}},
        "buttons": buttons,
    }
    figure = figure_of(traces, x="expert", y="decoder layer", updatemenus=[menu])
    figure = categories(figure, rows=len(diagnosis["layers"]))
    figure["layout"]["margin"] |= {"t": 56}
    figure["layout"]["height"] += 22
    return figure


def _when(diagnosis: dict[str, Any]) -> str:
    return f"Step {diagnosis['step']}, the latest diagnosis, {diagnosis['tokens']} tokens."


def _known(diagnosis: dict[str, Any], which: str) -> list[float]:
    return [x for x in diagnosis[which]["current"] if x is not None]


EVENNESS = [
    Curve(
        "Evenness of expert load",
        "Entropy of the load over log E: 100 % is all experts alike. A falling lowest layer is a router collapsing.",
        "load entropy / log E",
        (
            Series("mean of the layers", diagnosed(lambda d: mean(d["load_entropy"]["current"]))),
            Series("lowest layer", diagnosed(lambda d: min(_known(d, "load_entropy"), default=None)), "#D55E00"),
        ),
        NO_DIAGNOSIS,
        unit=True,
    ),
    Curve(
        "Busiest expert",
        "Load of a layer's busiest expert over an even share: with expert parallelism the others wait for it.",
        "times an even share",
        (
            Series("mean of the layers", diagnosed(lambda d: mean(d["load_imbalance"]["current"]))),
            Series("worst layer", diagnosed(lambda d: max(_known(d, "load_imbalance"), default=None)), "#D55E00"),
        ),
        NO_DIAGNOSIS,
    ),
]
