"""`megasapo report` of one run: the page holds the files' numbers, escapes what is data, and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from tests.unit.report_page import NASTY, Page, diagnoses_of, make_run, names_of, report, rows_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return report(run)


def test_every_chart_is_one_that_plotly_knows_and_says_what_to_look_for(page: Page) -> None:
    assert len(page.charts) >= 30
    for title, (figure,) in page.charts.items():
        go.Figure(figure)  # raises on an unknown attribute or value
        assert title
        assert figure["layout"]["yaxis"]["title"]["text"]
        assert figure["layout"]["xaxis"]["title"]["text"]
        assert any(trace.get("y") for trace in figure["data"])
    looks = re.findall(r'<p class="look">\s*([^<]{20,})', page.source)
    assert len(looks) >= len(page.charts)


@pytest.mark.parametrize(
    ("title", "name", "metric"),
    [
        ("Training reward", "reward", "reward/mean"),
        ("Held-out pass@k", "pass@1", "eval/pass@1"),
        ("Response length", "longest", "response/length_max"),
        ("Truncated responses", "truncated", "response/truncated_frac"),
        ("SAPO gate by sign of the advantage", "advantage &gt; 0", "sapo/gate_mean_pos"),
        ("SAPO gate by sign of the advantage", "advantage &lt; 0", "sapo/gate_mean_neg"),
        ("Log-ratio quantiles", "median", "ratio/log_q50"),
        ("Effective sample size", "effective", "ratio/ess"),
        ("Mismatch of rollout server and learner", "KL(rollout ‖ learner)", "mismatch/kl"),
        ("Gradient norm", "norm", "grad/norm"),
        ("Entropy", "entropy", "entropy/mean"),
        ("Seconds of a step by phase", "rollout", "time/rollout_s"),
    ],
)
def test_curves_are_those_of_metrics(run: Path, page: Page, title: str, name: str, metric: str) -> None:
    found = [(row["step"], row[metric]) for row in rows_of(run) if row.get(metric) is not None]
    trace = page.trace(title, name)
    assert trace["x"] == [step for step, _ in found]
    assert trace["y"] == pytest.approx([value for _, value in found], rel=1e-5)


def test_quantile_bands_lie_between_their_quantiles(run: Path, page: Page) -> None:
    rows = rows_of(run)
    outer = [t for t in page.chart("Log-ratio quantiles")["data"] if t["name"] == "98 % of the tokens"]
    assert [t["y"] for t in outer] == [[row[f"ratio/log_q{q}"] for row in rows] for q in ("01", "99")]
    assert [t.get("fill") for t in outer] == [None, "tonexty"]


def test_phases_add_up_to_the_step(run: Path, page: Page) -> None:
    stacked = np.sum([trace["y"] for trace in page.chart("Seconds of a step by phase")["data"]], axis=0)
    np.testing.assert_allclose(stacked, [row["time/step_s"] for row in rows_of(run)], rtol=1e-4)


def test_shares_are_those_of_the_diagnoses(run: Path, page: Page) -> None:
    diagnoses = diagnoses_of(run)
    for term in ("engine", "mismatch", "update", "drift"):
        trace = page.trace("Shares of the log-ratio's variance", term)
        assert trace["x"] == [2, 4, 6]
        assert trace["y"] == pytest.approx([d["share"][term] for d in diagnoses], rel=1e-5)
        variance = page.trace("Variance of each term", term)
        assert variance["y"] == pytest.approx([d["term_variance"][term] for d in diagnoses], rel=1e-5)
    whole = page.trace("Variance of each term", "whole log-ratio")
    assert whole["y"] == pytest.approx([d["variance"] for d in diagnoses], rel=1e-5)


def test_a_run_without_fp8_does_not_speak_of_it(page: Page) -> None:
    assert names_of(page.chart("Shares of the log-ratio's variance")) == ["engine", "mismatch", "update", "drift"]
    assert "Variance that FP8 adds" not in page.source
    visible = re.sub(r"<(script|style).*?</\1>", "", page.source, flags=re.DOTALL)
    assert "fp8" not in visible.lower()
    assert "fp8" not in page.samples[0]["groups"][0]["samples"][0]


@pytest.mark.parametrize(
    ("title", "figure", "term"),
    [
        ("Flipped experts between engines", "flip_rate", "mismatch"),
        ("Flipped experts by the update", "flip_rate", "drift"),
        ("Overlap of expert sets between engines", "jaccard", "mismatch"),
        ("Overlap of expert sets before and after the update", "jaccard", "drift"),
    ],
)
def test_heat_maps_have_a_row_a_layer_and_a_column_a_step(
    run: Path, page: Page, title: str, figure: str, term: str
) -> None:
    (trace,) = page.chart(title)["data"]
    assert (trace["x"], trace["y"]) == (["2", "4", "6"], ["1", "2", "5"])
    by_step = [d[figure][term] for d in diagnoses_of(run)]
    np.testing.assert_allclose(trace["z"], np.transpose(by_step), rtol=1e-5)


def test_latest_diagnosis_by_layer_group_flips_position_and_sign(run: Path, page: Page) -> None:
    latest = diagnoses_of(run)[-1]
    sweep = page.trace("Which layers' flips matter", "drift")
    assert sweep["x"] == ["1-2", "5"]
    assert sweep["y"] == pytest.approx(latest["sweep"]["share"]["drift"], rel=1e-5)
    for title, which in (
        ("Does variance sit where experts flipped?", "by_flips"),
        ("Does variance grow along the response?", "by_position"),
    ):
        share = page.trace(title, "share of Var(d)")
        assert share["y"] == pytest.approx([row["share"] for row in latest[which]], rel=1e-5)
        tokens = page.trace(title, "share of the tokens")
        assert tokens["y"] == pytest.approx([row["tokens"] / latest["tokens"] for row in latest[which]], rel=1e-5)
    stacked = sum(np.array(trace["y"]) for trace in page.chart("Variance by sign of the advantage")["data"])
    by_sign = [latest["by_sign"][sign]["variance"] for sign in ("positive", "negative")]
    np.testing.assert_allclose(stacked, by_sign, rtol=1e-5)


def test_counterfactuals(run: Path, page: Page) -> None:
    for title, figure in (
        ("If this were GRPO: clipped tokens", "grpo_clip_frac"),
        ("If this were GSPO: clipped sequences", "gspo_clip_frac"),
        ("If this were SAPO: gate, advantage > 0", "sapo_gate_pos"),
        ("If this were SAPO: gate, advantage < 0", "sapo_gate_neg"),
    ):
        for name, which in (("all terms", "full"), ("update + drift", "learner"), ("update alone", "R2")):
            expected = [d["counterfactual"][which][figure] for d in diagnoses_of(run)]
            assert page.trace(title, name)["y"] == pytest.approx(expected, rel=1e-5)


def test_expert_load_entropy_and_the_costliest(run: Path, page: Page) -> None:
    diagnoses = diagnoses_of(run)
    latest = diagnoses[-1]["experts"]
    for who, name in (("current", "learner after it"), ("rollout", "rollout server")):
        np.testing.assert_allclose(page.trace("Expert load", name)["z"], 4 * np.array(latest["load"][who]), rtol=1e-5)
    flips = page.trace("Experts that flip", "by the update (drift)")
    np.testing.assert_allclose(flips["z"], latest["flips"]["drift"], rtol=1e-5)
    lowest = page.trace("Evenness of expert load", "lowest layer")["y"]
    assert lowest == pytest.approx([min(d["load_entropy"]["current"]) for d in diagnoses], rel=1e-5)
    worst = page.trace("Busiest expert", "worst layer")["y"]
    assert worst == pytest.approx([max(d["load_imbalance"]["current"]) for d in diagnoses], rel=1e-5)
    costliest = max(np.max(latest["share"][term]) for term in ("mismatch", "drift"))
    assert f"{costliest:.2%}" in page.text


def test_samples_carry_every_token_beside_their_prompt(run: Path, page: Page) -> None:
    (data,) = page.samples
    assert data["step"] == 6
    assert [[s["uid"] for s in group["samples"]] for group in data["groups"]] == [[4, 5], [7]]
    assert [group["prompt"] for group in data["groups"]] == [f"prompt 2 {NASTY}", f"prompt 3 {NASTY}"]
    for sample in (sample for group in data["groups"] for sample in group["samples"]):
        assert sample["reward"] == sample["uid"] / 4
        assert sample["finish"] == "stop"
        assert sample["all"] == len(sample["token"]) == len(sample["gate"]) == 8
        parts = np.sum([sample[term] for term in ("engine", "mismatch", "update", "drift")], axis=0)
        np.testing.assert_allclose(parts, sample["log_ratio"], atol=1e-4)


def test_facts(page: Page) -> None:
    for fact in ("not finished: step 6 of 10", "models/tiny (float32)", "tp 2, ep 4", "tau 1.0 / 1.05", "R2"):
        assert fact in page.text


def test_what_comes_from_data_cannot_become_markup(page: Page) -> None:
    assert "img" not in page.tags
    assert "b" not in page.tags
    assert len(page.scripts) == 2
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert any(NASTY in token for token in page.samples[0]["groups"][0]["samples"][0]["token"])


def test_names_and_events_from_data_are_escaped_too(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name=name + NASTY.replace("/", ""), diagnose=False) for name in ("a", "b")]
    event = {"step": 4, "metric": NASTY, "value": None, "why": NASTY, "action": "warn"}
    (runs[0] / "events.jsonl").write_text(json.dumps(event) + "\n")
    page = report(*runs, "--out", tmp_path / "page.html")
    assert "img" not in page.tags
    assert page.text.count(NASTY) == 2
    names = {trace["name"] for trace in page.chart("Training reward")["data"]}
    assert all("<" not in name and "&lt;img" in name for name in names)


def test_stability_events_are_listed_and_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", diagnose=False)
    events = [
        {"step": 2, "metric": "ratio/log_var", "value": 0.125, "why": "robust z 9.5 above 6", "action": "warn"},
        {"step": 5, "metric": "grad/norm", "value": 3.0, "why": "above 2", "action": "rollback"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = report(run)
    for text in ("robust z 9.5 above 6", "rollback", "0.125"):
        assert text in page.text
    (marks,) = page.chart("Training reward")["layout"]["shapes"]
    assert (marks["path"], marks["yref"]) == ("M2,0V1M5,0V1", "paper")


def test_the_page_asks_the_network_for_nothing(page: Page) -> None:
    links = [(tag, name, value) for tag, name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert links
    assert {(tag, name) for tag, name, _ in links} == {("a", "href")}
    anchors = {value for _, name, value in page.attributes if name == "id"}
    assert {value for _, _, value in links} <= {f"#{anchor}" for anchor in anchors}
    assert "link" not in page.tags
    assert "url(" not in "".join(page.styles)
    assert "@import" not in "".join(page.styles)


def test_only_the_pages_own_scripts_may_run_and_load_nothing(page: Page) -> None:
    (policy,) = [value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    assert re.sub(r"\s+;", ";", policy) == (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    )
