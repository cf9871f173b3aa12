"""Charts of metrics.jsonl over steps, all runs in each: learning, the update's health, engines apart.

A chart is a row of a table here; to add one is to add a row. What no run has is left out, with the row's sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megasapo.report.blocks import Chart, Part, Section
from megasapo.report.figures import (
    RUN_COLOURS,
    STEP,
    Figure,
    Points,
    Series,
    curves,
    diagnosed,
    figure_of,
    line,
    mark_events,
    metric,
)
from megasapo.report.read import Run

POSITIVE, NEGATIVE = "#009E73", "#D55E00"  # by the sign of the advantage, wherever it is shown


@dataclass(frozen=True)
class Curve:
    title: str
    look: str
    y: str
    series: tuple[Series, ...]
    missing: str = "only runs of megasapo train have it."
    log: bool = False
    unit: bool = False


def learning(runs: Sequence[Run]) -> Section:
    """Reward, held-out accuracy, lengths."""
    part = curve_part(runs, [*LEARNING[:1], _held_out(runs), *LEARNING[1:]])
    intro = "Is it learning? Training reward and what it does to responses; the held-out figure is the one to believe."
    return Section("learning", "Learning", intro, [part])


def cold_start(runs: Sequence[Run]) -> Section:
    """Of runs of `megasapo sft`."""
    return Section("learning", "Learning", "", [curve_part(runs, [SFT, GRADIENT])])


def update(runs: Sequence[Run]) -> Section:
    """Ratios, gate, gradient, entropy."""
    part = curve_part(runs, UPDATE)
    quantiles = _quantiles(runs)
    if quantiles is None:
        part.missing.append("Log-ratio quantiles: these runs logged no ratio/log_q01 to ratio/log_q99.")
    else:
        part.blocks.insert(1 if part.blocks else 0, quantiles)
    intro = (
        "How far each token's probability moved: log-ratio d = log π(token) now - before (algo.old_logprobs: whose), "
        "ratio r = exp(d). SAPO multiplies a token's gradient by a gate w, 1 at r = 1 and falling to 0 away from it."
    )
    return Section("update", "Policy update", intro, [part])


def curve_part(runs: Sequence[Run], table: Sequence[Curve]) -> Part:
    """The charts that any run has numbers for; sentences for the others."""
    part = Part([])
    for curve in table:
        figure = curves(runs, curve.series, y=curve.y, log=curve.log, unit=curve.unit)
        if not figure["data"]:
            part.missing.append(f"{curve.title}: {curve.missing}")
            continue
        there = {trace["meta"]["run"] for trace in figure["data"] if "meta" in trace}
        without = [run.label for i, run in enumerate(runs) if i not in there]
        note = f"Not in this chart: {', '.join(without)} ({curve.missing.rstrip('.')})." if without else ""
        part.blocks.append(Chart(curve.title, curve.look, mark_events(figure, runs), note=note))
    return part


def _held_out(runs: Sequence[Run]) -> Curve:
    names = sorted({name for run in runs for row in run.rows for name in row if name.startswith("eval/pass@")})
    names.sort(key=lambda name: int(name.removeprefix("eval/pass@")))
    return Curve(
        "Held-out pass@k",
        "Share of unseen problems solved. Training reward that rises while this falls: over-fitting or a gamed reward.",
        "share of problems solved",
        tuple(Series(name.removeprefix("eval/"), metric(name)) for name in names or ["eval/pass@1"]),
        "needs train.eval_every and data.eval.",
        unit=True,
    )


def _quantiles(runs: Sequence[Run]) -> Chart | None:
    """One run: bands around the median. Several: median and outer quantiles as lines."""
    names = {q: metric(f"ratio/log_q{q}") for q in ("01", "05", "50", "95", "99")}
    look = (
        "Half of all tokens lie below the median line, 98 % between the outer lines. Tails that widen while the median "
        "stays at 0 mean a few tokens, not the policy as a whole, ran away."
    )
    title, y = "Log-ratio quantiles", "log-ratio d (nats)"
    if len(runs) > 1:
        series = [Series(f"{int(q)} %", names[q]) for q in ("50", "01", "99")]
        figure = curves(runs, series, y=y)
    else:
        figure = _bands({q: points(runs[0]) for q, points in names.items()}, y)
    return Chart(title, look, mark_events(figure, runs)) if figure["data"] else None


def _bands(quantiles: dict[str, Points], y: str) -> Figure:
    if not quantiles["50"][0]:
        return figure_of([], x=STEP, y=y)
    data = []
    blue = RUN_COLOURS[0]
    for low, high, name, fill in (("01", "99", "98 %", "0.15"), ("05", "95", "90 %", "0.32")):
        for q in (low, high):
            trace = line(*quantiles[q], f"{name} of the tokens", blue) | {"mode": "lines", "meta": {"run": 0}}
            trace |= {"line": {"color": "rgba(0,114,178,0.5)", "width": 0.8}, "showlegend": q == high}
            trace["hovertemplate"] = f"%{{y:.3~g}}<extra>{int(q)} %</extra>"
            if q == high:
                trace |= {"fill": "tonexty", "fillcolor": f"rgba(0,114,178,{fill})"}
            data.append(trace)
    data.append(line(*quantiles["50"], "median", blue) | {"hovertemplate": "%{y:.3~g}", "meta": {"run": 0}})
    return figure_of(data, x=STEP, y=y)


SFT = Curve(
    "Cold-start loss",
    "Mean negative log-likelihood of a token of the demonstrations; should fall and level off.",
    "loss (nats a token)",
    (Series("loss", metric("loss/sft")),),
    "not a cold start.",
)
GRADIENT = Curve(
    "Gradient norm",
    "Before clipping (optim.clip_grad). Spikes that return are batches; a climb that stays is instability.",
    "L2 norm of the gradient",
    (Series("norm", metric("grad/norm")),),
    "not logged.",
    log=True,
)
LEARNING = [
    Curve(
        "Training reward",
        "Should rise. A sudden fall that does not recover is a collapse: look at the same step in the charts below.",
        "mean reward of a response",
        (Series("reward", metric("reward/mean")),),
    ),
    Curve(
        "Groups that teach nothing",
        "Groups whose responses all got one reward teach nothing: when their share nears 100 %, problems are too easy "
        "or too hard (rollout.drop_zero_variance draws others).",
        "share of groups",
        (Series("groups", metric("groups/zero_variance_frac")),),
        unit=True,
    ),
    Curve(
        "Response length",
        "Growth with reward is the model taking room to think; growth without reward is rambling.",
        "tokens of a response",
        (Series("mean", metric("response/length_mean")), Series("longest", metric("response/length_max"))),
    ),
    Curve(
        "Truncated responses",
        "Cut off at rollout.max_new_tokens, so mostly scored as wrong: above a few percent the limit shapes learning.",
        "share of responses",
        (Series("truncated", metric("response/truncated_frac")),),
        unit=True,
    ),
]
UPDATE = [
    Curve(
        "SAPO gate by sign of the advantage",
        "Mean gate weight w; 1 means on-policy. A fall means that updates are being held back, on responses to "
        "encourage (advantage > 0) or to discourage (< 0).",
        "mean gate weight w",
        (
            Series("advantage > 0", metric("sapo/gate_mean_pos"), POSITIVE),
            Series("advantage < 0", metric("sapo/gate_mean_neg"), NEGATIVE),
        ),
        "only SAPO has one: set algo.objective to sapo.",
    ),
    Curve(
        "Variance of the log-ratio",
        "The spread behind everything else here; jumps by orders of magnitude come before a collapse. "
        "The section on variance says what it consists of.",
        "Var(d) over tokens (nats²)",
        (Series("Var(d)", metric("ratio/log_var")),),
        log=True,
    ),
    Curve(
        "Effective sample size",
        "(Σr)² / (n Σr²): 100 % when every token counts alike; at 50 % half of the batch is lost to a few big ratios.",
        "share of the tokens",
        (Series("effective", metric("ratio/ess")),),
        unit=True,
    ),
    Curve(
        "Clipped tokens",
        "Share of the batch that this objective's clip takes out of the gradient.",
        "share",
        (Series("clipped", metric("ratio/clip_frac")),),
        "SAPO gates instead; objectives that clip have it (algo.objective: grpo, gspo, dapo, ...).",
        unit=True,
    ),
    Curve(
        "Mismatch of rollout server and learner",
        "Log-probabilities of the sampled tokens, server against learner before the update. On-policy this is numerics "
        "alone and should stay flat; stale samples add to it.",
        "nats a token",
        (
            Series("KL(rollout ‖ learner)", metric("mismatch/kl")),
            Series("mean |difference|", metric("mismatch/logprob_abs_diff")),
        ),
        log=True,
    ),
    GRADIENT,
    Curve(
        "Entropy",
        "Should decline slowly. Near 0 the policy has stopped exploring; a rise with falling reward is a policy coming "
        "apart.",
        "mean entropy of a token (nats)",
        (Series("entropy", metric("entropy/mean")),),
        "not logged.",
    ),
    Curve(
        "KL to the starting model",
        "How far the policy has gone from where it began (k3 estimate).",
        "KL (nats a token)",
        (Series("KL", metric("loss/kl")),),
        "needs algo.kl_coef above 0.",
    ),
    Curve(
        "Staleness",
        "Versions of the weights between sampling and learning; 0 is on-policy.",
        "weight versions",
        (Series("mean", metric("staleness/mean")), Series("most", metric("staleness/max"))),
    ),
]
NO_DIAGNOSIS = "set routing.diagnose_every to the number of steps between diagnoses."


def _counterfactual(figure: str) -> tuple[Series, ...]:
    names = {"full": "all terms", "learner": "update + drift", "R2": "update alone"}
    colours = dict(zip(names, ("#1f2933", "#CC79A7", "#0072B2")))

    def of(which: str) -> Series:
        return Series(
            names[which], diagnosed(lambda d: (d["counterfactual"].get(which) or {}).get(figure)), colours[which]
        )

    return tuple(of(which) for which in names)


COUNTERFACTUALS = [
    Curve(
        "If this were GRPO: clipped tokens",
        "Share of this batch's tokens that GRPO's clip would drop: with the whole log-ratio; with update + drift, "
        "which training without replay measures; with the update alone, which replay R2 measures.",
        "share of the tokens",
        _counterfactual("grpo_clip_frac"),
        NO_DIAGNOSIS,
        unit=True,
    ),
    Curve(
        "If this were GSPO: clipped sequences",
        "The same for GSPO's clip of whole responses. The gap between the lines is what flipped experts cost.",
        "share of the responses",
        _counterfactual("gspo_clip_frac"),
        NO_DIAGNOSIS,
        unit=True,
    ),
    Curve(
        "If this were SAPO: gate, advantage > 0",
        "Mean gate weight that each log-ratio would give; 1 lets everything through.",
        "mean gate weight w",
        _counterfactual("sapo_gate_pos"),
        NO_DIAGNOSIS,
    ),
    Curve(
        "If this were SAPO: gate, advantage < 0",
        "The same where the advantage is negative; tau_neg closes this gate a little faster.",
        "mean gate weight w",
        _counterfactual("sapo_gate_neg"),
        NO_DIAGNOSIS,
    ),
]
