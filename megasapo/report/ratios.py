"""Why importance ratios vary: charts of the diagnoses of a run, from terms over layers to single experts.

Shares are covariance shares Cov(term, d) / Var(d): they add up to 100 %, and one can be negative where its term
offsets another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megasapo.report.blocks import Block, Chart, Part, Section
from megasapo.report.curves import COUNTERFACTUALS, NO_DIAGNOSIS, Curve, curve_part
from megasapo.report.figures import (
    STEP,
    TERM_COLOURS,
    Series,
    bars,
    categories,
    diagnosed,
    figure_of,
    heat_map,
    line,
    mark_events,
    rounded,
)
from megasapo.report.read import Run

SHARE = "share of Var(d)"
INTRO = (
    "On diagnosed steps the log-ratio of every token is taken apart exactly: d = engine (same weights, same experts, "
    "two engines' numerics) + mismatch (the engines chose different experts) + update (weights moved, experts held) + "
    "drift (experts moved because weights did). Only update is what the algorithm asked for. Shares of the variance "
    "add up to 100 %; a negative one offsets the others."
)
FP8_INTRO = (
    " Where the learner computes in FP8, engine is about the learner without it, and fp8 is what quantisation adds "
    "with the same weights and the same experts."
)


def variance(runs: Sequence[Run]) -> Section:
    """A part for each diagnosed run, then overlaid figures of all."""
    with_fp8 = any("fp8" in _terms(run) for run in runs)
    part = curve_part(runs, [*OVER_STEPS, *([FP8_OVER_STEPS] if with_fp8 else []), *COUNTERFACTUALS])
    if not any(run.diagnoses for run in runs):
        part = Part([], [f"Why ratios vary: no diagnosis in {_those(runs)}; {NO_DIAGNOSIS}"])
    own = [_of_run(i, run) for i, run in enumerate(runs) if run.diagnoses]
    return Section("variance", "Why ratios vary", INTRO + (FP8_INTRO if with_fp8 else ""), [*own, part])


def _those(runs: Sequence[Run]) -> str:
    return "this run" if len(runs) == 1 else "these runs"


def _of_run(index: int, run: Run) -> Part:
    latest = run.diagnoses[-1]
    blocks: list[Block] = [_shares(run), _variances(run)]
    blocks += [_flips(run, *kind) for kind in FLIP_MAPS]
    blocks += [_bins(latest, "by_flips"), _bins(latest, "by_position"), _by_sign(latest)]
    missing = []
    if latest["sweep"] is None:
        missing.append("Shares by layer: set routing.diagnose_sweep to a number of layer groups.")
    else:
        blocks.append(_sweep(latest))
    return Part(blocks, missing, index)


def _terms(run: Run) -> dict[str, str]:
    """The terms of any of its diagnoses with their colours, in order."""
    return {term: colour for term, colour in TERM_COLOURS.items() if any(term in d["share"] for d in run.diagnoses)}


def _shares(run: Run) -> Chart:
    steps = [d["step"] for d in run.diagnoses]
    data = [
        bars(steps, [d["share"].get(term) for d in run.diagnoses], term, colour, "%{y:.3~%}")
        for term, colour in _terms(run).items()
    ]
    figure = figure_of(data, x=STEP, y=SHARE, names=len(steps) == 1, percent=True, barmode="relative", bargap=0.12)
    look = (
        "Blue is learning itself. Growing pink or orange means that the ratios measure flipped experts: replay the "
        "learner's routing (algo.routing_replay: R2) against drift, the server's (R3) against mismatch."
    )
    return Chart("Shares of the log-ratio's variance", look, mark_events(figure, [run]))


def _variances(run: Run) -> Chart:
    def series(value: Any) -> tuple[list[float], list[float | None]]:
        return [d["step"] for d in run.diagnoses], rounded([value(d) for d in run.diagnoses])

    data = [line(*series(lambda d: d["variance"]), "whole log-ratio", "#1f2933")]
    for term, colour in _terms(run).items():
        data.append(line(*series(lambda d, term=term: d["term_variance"].get(term)), term, colour))
    largest = max((y for y in data[0]["y"] if y is not None), default=0.0)
    for trace in data:
        # a logarithm has no place for 0, and rounding errors would make the rest a flat line
        trace["y"] = [y if y is not None and y > 1e-8 * largest else None for y in trace["y"]]
        trace["hovertemplate"] = "%{y:.3~g}"
    figure = figure_of(data, x=STEP, y="variance over tokens (nats²)")
    figure["layout"]["yaxis"]["type"] = "log"
    look = (
        "The same in absolute size, on a logarithmic axis: shares alone hide whether there is anything to worry about."
    )
    return Chart("Variance of each term", look, mark_events(figure, [run]))


FLIP_MAPS = (
    (
        "flip_rate",
        "mismatch",
        "Flipped experts between engines",
        "share of choices",
        "A dark row is a layer whose router the two engines resolve differently: near-ties, or numerics that differ "
        "from that layer on.",
    ),
    (
        "flip_rate",
        "drift",
        "Flipped experts by the update",
        "share of choices",
        "A dark column is a step that moved the routers; rows that darken from bottom to top are flips that feed later "
        "layers.",
    ),
    (
        "jaccard",
        "mismatch",
        "Overlap of expert sets between engines",
        "mean Jaccard",
        "Experts chosen by both over experts chosen by either: 1 (white) is the same set, 0 none in common.",
    ),
    (
        "jaccard",
        "drift",
        "Overlap of expert sets before and after the update",
        "mean Jaccard",
        "The same for the update: dark cells are layers that now send tokens elsewhere.",
    ),
)


def _flips(run: Run, kind: str, term: str, title: str, unit: str, look: str) -> Chart:
    layers = run.diagnoses[-1]["layers"]
    steps = [d["step"] for d in run.diagnoses]
    z = [[d[kind][term][i] for d in run.diagnoses] for i in range(len(layers))]
    known = [x for d in run.diagnoses for t in ("mismatch", "drift") for x in d[kind][t] if x is not None]
    is_rate = kind == "flip_rate"
    limits = {"zmin": 0, "zmax": max([*known, 1e-9])} if is_rate else {"zmin": min([*known, 1 - 1e-9]), "zmax": 1}
    colours = SEQUENTIAL if is_rate else [(1.0 - at, colour) for at, colour in reversed(SEQUENTIAL)]
    shown = "%{z:.3~%}" if is_rate else "%{z:.4~g}"
    trace = heat_map(steps, layers, z, bar=unit, colorscale=colours, **limits)
    trace["hovertemplate"] = f"step %{{x}}, layer %{{y}}: {shown}<extra></extra>"
    if is_rate:
        trace["colorbar"]["tickformat"] = ".2~%"
    note = ""
    if term == "mismatch" and (unknown := max(d["unknown_rows"] or 0 for d in run.diagnoses)):
        note = f"Up to {unknown:.2%} of the server's choices are unknown and left out."
    figure = categories(figure_of([trace], x=STEP, y="decoder layer"), rows=len(layers))
    return Chart(title, look, figure, note=note)


SEQUENTIAL = ((0.0, "#fbfbfd"), (0.25, "#d5cbe6"), (0.5, "#a58cc7"), (0.75, "#6f4ba0"), (1.0, "#3b1a6b"))
BINS = {
    "by_flips": (
        "Does variance sit where experts flipped?",
        "Tokens by how many layers changed their experts, mismatch and drift together. Orange above grey: these tokens "
        "cause more than their part of the variance.",
        "layers that changed experts, mismatch + drift",
    ),
    "by_position": (
        "Does variance grow along the response?",
        "Orange above grey late in the response means that errors build up as context differs.",
        "position in the response (tokens)",
    ),
}


def _bins(diagnosis: dict[str, Any], which: str) -> Chart:
    title, look, x = BINS[which]
    rows = [row for row in diagnosis[which] if row["tokens"]]
    names = [_span(row["from"], row["to"]) for row in rows]
    total = sum(row["tokens"] for row in rows)
    hover = "%{y:.3~%} (%{customdata[0]} tokens, variance %{customdata[1]:.3~g})"
    more = {"customdata": [[row["tokens"], row["variance"]] for row in rows]}
    data = [
        bars(names, [row["tokens"] / total for row in rows], "share of the tokens", "#b4bac3", hover, **more),
        bars(names, [row["share"] for row in rows], SHARE, "#E69F00", hover, **more),
    ]
    figure = figure_of(data, x=x, y="share", names=True, percent=True, barmode="group", bargap=0.25)
    return Chart(title, look, figure, note=_latest(diagnosis))


def _latest(diagnosis: dict[str, Any]) -> str:
    return f"Step {diagnosis['step']}, the latest diagnosis."


def _span(start: int, end: int | None) -> str:
    """Integers from start to before end."""
    if end is None:
        return f"{start} and more"
    return str(start) if end == start + 1 else f"{start}-{end - 1}"


def _by_sign(diagnosis: dict[str, Any]) -> Chart:
    signs = [(name, of) for name, of in diagnosis["by_sign"].items() if of["tokens"]]
    labels = {"positive": "A > 0", "negative": "A < 0", "zero": "A = 0"}
    names = [f"{labels[name]}: {of['tokens']} tokens" for name, of in signs]
    data = [
        bars(names, [product(of["share"][term], of["variance"]) for _, of in signs], term, colour, "%{y:.3~g}")
        for term, colour in TERM_COLOURS.items()
        if term in diagnosis["share"]
    ]
    x = "advantage of the response"
    figure = figure_of(data, x=x, y="variance (nats²)", names=True, barmode="relative", bargap=0.45)
    look = "Height is the variance among tokens of one sign, colours what it consists of: is either sign out of line?"
    return Chart("Variance by sign of the advantage", look, figure, note=_latest(diagnosis))


def product(a: float | None, b: float | None) -> float | None:
    """None where either is undefined."""
    return None if a is None or b is None else a * b


def _sweep(diagnosis: dict[str, Any]) -> Chart:
    sweep = diagnosis["sweep"]
    names = [_layers(group) for group in sweep["groups"]]
    data = [bars(names, sweep["share"][term], term, TERM_COLOURS[term], "%{y:.3~%}") for term in ("mismatch", "drift")]
    x = "decoder layers set free"
    figure = figure_of(data, x=x, y=SHARE, names=True, percent=True, barmode="group", bargap=0.25)
    look = (
        "Experts are held below a layer and free from it on; the difference from group to group is what that group of "
        "layers contributes. The tall bars name the layers to look at."
    )
    return Chart("Which layers' flips matter", look, figure, note=_latest(diagnosis))


def _layers(group: Sequence[int]) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are defined."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


OVER_STEPS = [
    Curve(
        "Flipped experts over steps",
        "Share of expert choices that differ, mean of the layers: between engines (mismatch), by the update (drift).",
        "share of choices",
        (
            Series("mismatch", diagnosed(lambda d: mean(d["flip_rate"]["mismatch"])), TERM_COLOURS["mismatch"]),
            Series("drift", diagnosed(lambda d: mean(d["flip_rate"]["drift"])), TERM_COLOURS["drift"]),
        ),
        NO_DIAGNOSIS,
        unit=True,
    ),
    Curve(
        "Variance that is not the update's",
        "1 - share of update: all other terms together. Above 100 % they and the update pull opposite ways.",
        SHARE,
        (Series("share", diagnosed(lambda d: None if d["share"]["update"] is None else 1 - d["share"]["update"])),),
        NO_DIAGNOSIS,
        unit=True,
    ),
]
FP8_OVER_STEPS = Curve(
    "Variance that FP8 adds",
    "Share of fp8: the learner with quantisation against itself without, same weights, same experts. Laid over one "
    "another, runs say what a recipe costs.",
    SHARE,
    (Series("share", diagnosed(lambda d: d["share"].get("fp8")), TERM_COLOURS["fp8"]),),
    "only runs that are diagnosed and whose precision.recipe is not bf16 have it.",
    unit=True,
)
