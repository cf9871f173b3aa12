"""`megasapo report`: the page holds the numbers of the files, escapes what comes from data, and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import yaml

from megasapo import cli
from megasapo.routing.decompose import decompose
from megasapo.routing.scored import TERMS, TERMS_WITH_FP8, ScoredSequence
from megasapo.routing.store import token_rows, write_diagnosis

NASTY = "</script><img src=x onerror=alert(1)>&<b>"
STEPS = 6
GROUP = 2


class Page(HTMLParser):
    """What a browser would make of the page: its charts, sample data, scripts, attributes and visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.charts: dict[str, list[dict[str, Any]]] = {}  # by title, one a run
        self.samples: list[dict[str, Any]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.text = ""
        self._inside: tuple[str, dict[str, str]] = ("", {})
        self._data = ""
        self.source = path.read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside, self._data = (tag, {name: value or "" for name, value in attrs}), ""

    def handle_data(self, data: str) -> None:
        self._data += data
        if self._inside[0] not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "style":
            self.styles.append(self._data)
        if tag == "script":
            attributes = self._inside[1]
            if attributes.get("class") == "figure":
                self.charts.setdefault(attributes["data-title"], []).append(json.loads(self._data))
            elif attributes.get("class") == "tokens":
                self.samples.append(json.loads(self._data))
            else:
                assert not attributes
                self.scripts.append(self._data)
        self._inside = ("", {})

    def chart(self, title: str) -> dict[str, Any]:
        assert len(self.charts[title]) == 1
        return self.charts[title][0]

    def trace(self, title: str, name: str) -> dict[str, Any]:
        (found,) = [trace for trace in self.chart(title)["data"] if trace["name"] == name]
        return found


def make_run(
    directory: Path,
    *,
    name: str = "one",
    seed: int = 0,
    diagnose: bool = True,
    fp8_from: int = STEPS + 1,
    **changes: Any,
) -> Path:
    """A run directory of STEPS steps, evaluated and diagnosed at every second."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    config: dict[str, Any] = {
        "run": {"name": name, "seed": seed},
        "model": {"path": "models/tiny", "dtype": "float32"},
        "rollout": {"group_size": GROUP, "engine": "embedded", "max_staleness": 1},
        "algo": {"objective": "sapo", "tau_pos": 1.0, "tau_neg": 1.05, "routing_replay": "R2"},
        "parallel": {"tp": 2, "ep": 4},
        "train": {"steps": 10, "micro_batch_tokens": 512},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config | changes))
    rows = [_metrics(step, rng) for step in range(1, STEPS + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if diagnose:
        for step in range(2, STEPS + 1, 2):
            _diagnose(directory, step, rng, fp8=step >= fp8_from)
    return directory


def _metrics(step: int, rng: np.random.Generator) -> dict[str, Any]:
    names = [
        *("reward/mean", "groups/zero_variance_frac", "response/length_mean", "response/length_max"),
        *("response/truncated_frac", "sapo/gate_mean_pos", "sapo/gate_mean_neg", "ratio/log_var", "ratio/ess"),
        *("mismatch/kl", "mismatch/logprob_abs_diff", "grad/norm", "entropy/mean", "staleness/mean", "staleness/max"),
        *("perf/tokens_per_s", "time/rollout_s", "time/update_s"),
    ]
    row: dict[str, Any] = {"step": step} | {metric: float(rng.random() + 0.1) for metric in names}
    row |= {f"ratio/log_q{q}": (int(q) - 50) / 100 * step for q in ("01", "05", "50", "95", "99")}
    row["time/step_s"] = row["time/rollout_s"] + row["time/update_s"] + 0.25
    if step == 3:
        row["reward/mean"] = None  # as NaN is written
    if step % 2 == 0:
        row["eval/pass@1"], row["time/evaluate_s"] = float(rng.random()), 0.125
    return row


def _scored(uid: int, rng: np.random.Generator, *, spread: float = 0.3, fp8: bool = False) -> ScoredSequence:
    n, num_layers, top_k, num_experts = 12, 3, 2, 4
    logps = [rng.normal(-1, spread, n).astype(np.float32) for _ in range(5)]
    cut = rng.normal(-1, spread, (2, n)).astype(np.float32)
    routing = [np.argsort(rng.random((n, num_layers, num_experts)))[..., :top_k].astype(np.uint8) for _ in range(3)]
    return ScoredSequence(
        uid,
        rng.integers(0, 99, n).astype(np.int32),
        np.arange(n) >= 4,
        float((-1) ** uid),
        *logps,
        *routing,
        mismatch_sweep=np.stack([logps[2], cut[0], logps[1]]),
        drift_sweep=np.stack([logps[4], cut[1], logps[3]]),
        unquantised_replayed=rng.normal(-1, spread, n).astype(np.float32) if fp8 else None,
    )


def _diagnose(directory: Path, step: int, rng: np.random.Generator, *, fp8: bool) -> None:
    scored = [_scored(uid, rng, fp8=fp8) for uid in (4, 5, 7)]
    layers = (1, 2, 5)
    terms = TERMS_WITH_FP8 if fp8 else TERMS
    axes = {"layers": layers, "num_experts": 4, "sweep_groups": ((1, 2), (5,)), "terms": terms}
    whole = decompose(scored, **axes, tau_pos=1.0, tau_neg=1.05)
    rows = [
        token_rows(
            one, reward=one.uid / 4, decode=lambda ids: f"<{ids[0]}>" + NASTY * (ids[0] % 2), tau_pos=1.0, tau_neg=1.05
        )
        for one in scored
    ]
    write_diagnosis(directory, step, whole, rows, behaviour_version=step - 1, current_version=step)
    (directory / "rollouts").mkdir(exist_ok=True)
    samples = [(uid, i) for uid in (2, 3) for i in range(GROUP)]
    for part in (0, 1):
        lines = [
            {"uid": uid, "sample": i, "prompt": f"prompt {uid} {NASTY}", "answer": "7", "finish_reason": "stop"}
            for uid, i in samples[part::2]
        ]
        path = directory / "rollouts" / f"step_{step:08d}.part-{part}-of-2.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def diagnoses_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run / "routing" / "diagnosis").glob("*.json"))]


def report(*arguments: Path | str) -> Page:
    assert cli.main(["report", *map(str, arguments)]) == 0
    return Page(Path(arguments[-1]) if "--out" in arguments else Path(arguments[0]) / "report.html")


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


def names_of(figure: dict[str, Any]) -> list[str]:
    return [trace["name"] for trace in figure["data"]]


def test_a_run_without_fp8_does_not_speak_of_it(page: Page) -> None:
    assert names_of(page.chart("Shares of the log-ratio's variance")) == ["engine", "mismatch", "update", "drift"]
    assert "Variance that FP8 adds" not in page.source
    visible = re.sub(r"<(script|style).*?</\1>", "", page.source, flags=re.DOTALL)
    assert "fp8" not in visible.lower()
    assert "fp8" not in page.samples[0]["groups"][0]["samples"][0]


def test_fp8_is_a_term_of_the_runs_that_have_it(tmp_path: Path) -> None:
    plain, fp8 = make_run(tmp_path / "plain"), make_run(tmp_path / "fp8", name="fp8", fp8_from=2)
    resumed = make_run(tmp_path / "resumed", name="resumed", fp8_from=4)  # with another recipe after step 2
    five = ["engine", "fp8", "mismatch", "update", "drift"]
    page = report(plain, fp8, resumed)
    charts = page.charts["Shares of the log-ratio's variance"]
    assert [names_of(figure) for figure in charts] == [[*five[:1], *five[2:]], five, five]
    colours = [{trace["name"]: trace["marker"]["color"] for trace in figure["data"]} for figure in charts]
    assert colours[0].items() < colours[1].items(), "a term has one colour on the page"
    assert len(set(colours[1].values())) == 5
    diagnoses = diagnoses_of(resumed)
    expected = [d["share"].get("fp8") for d in diagnoses]
    assert expected[0] is None
    (share,) = [trace["y"] for trace in charts[2]["data"] if trace["name"] == "fp8"]
    assert share[0] is None
    assert share[1:] == pytest.approx(expected[1:], rel=1e-5)
    (variance,) = [t["y"] for t in page.charts["Variance of each term"][2]["data"] if t["name"] == "fp8"]
    assert variance[1:] == pytest.approx([d["term_variance"]["fp8"] for d in diagnoses[1:]], rel=1e-5)
    signs = page.charts["Variance by sign of the advantage"]
    assert [names_of(figure) for figure in signs] == [[*five[:1], *five[2:]], five, five]
    added = page.chart("Variance that FP8 adds")
    lines = {trace["meta"]["run"]: trace for trace in added["data"]}
    assert lines.keys() == {1, 2}
    assert lines[2]["x"] == [4, 6]
    assert lines[2]["y"] == pytest.approx(expected[1:], rel=1e-5)
    assert "Not in this chart: one (only runs that are diagnosed and whose precision.recipe" in page.text
    sample = page.samples[1]["groups"][0]["samples"][0]
    np.testing.assert_allclose(
        np.sum([sample[term] for term in five], axis=0), np.asarray(sample["log_ratio"]), atol=1e-4
    )


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
    assert [shape["x0"] for shape in page.chart("Training reward")["layout"]["shapes"]] == [2, 5]


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


def test_several_runs_share_charts_and_keep_maps_and_samples_apart(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", name="one")
    two = make_run(tmp_path / "two", name="two", seed=1, train={"steps": 6})
    (two / "done").write_text("{}")
    page = report(one, two, "--out", tmp_path / "both.html")
    for figures in page.charts.values():
        for figure in figures:
            go.Figure(figure)
    data = page.chart("Training reward")["data"]
    assert [trace["meta"]["run"] for trace in data] == [0, 1]
    for run, trace in zip((one, two), data):
        expected = [row["reward/mean"] for row in rows_of(run) if row["reward/mean"] is not None]
        assert trace["y"] == pytest.approx(expected, rel=1e-5)
    gate = page.chart("SAPO gate by sign of the advantage")["data"]
    assert [trace["name"] for trace in gate if trace["showlegend"]] == ["advantage &gt; 0", "advantage &lt; 0"]
    assert len({trace["line"]["color"] for trace in gate if "meta" in trace}) == 2
    assert len(page.charts["Flipped experts by the update"]) == len(page.samples) == 2
    for text in ("finished at step 6", "train.steps", "train.micro_batch_tokens", "(not set)"):
        assert text in page.text
    assert not (one / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name="same", seed=i, diagnose=False) for i, name in enumerate("ab")]
    page = report(*runs)
    assert {trace["name"] for trace in page.chart("Training reward")["data"]} == {str(run) for run in runs}


def test_what_a_run_lacks_is_left_out_with_the_setting_that_brings_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "bare", diagnose=False)
    rows = [{"step": row["step"], "reward/mean": row["reward/mean"]} for row in rows_of(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(run)
    assert list(page.charts) == ["Training reward"]
    assert page.samples == []
    for setting in ("train.eval_every", "routing.diagnose_every", "routing.diagnose_samples", "stability.mode"):
        assert setting in page.text


def test_a_chart_says_which_run_is_not_in_it(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", name="two", diagnose=False)
    page = report(one, two)
    assert "Not in this chart: two" in page.text
    assert len(page.charts["Expert load"]) == 1


def test_undefined_shares_and_unknown_layers_draw_as_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", diagnose=False)
    scored = _scored(4, np.random.default_rng(0), spread=0.0)
    scored.routing_rollout.view(np.int8)[:] = 0
    scored = ScoredSequence(
        **{name: getattr(scored, name) for name in ScoredSequence.__slots__ if name != "routing_rollout"},
        routing_rollout=np.full(scored.routing_rollout.shape, -1, dtype=np.int16),
    )
    axes = {"layers": (0, 1, 2), "num_experts": 4, "sweep_groups": ((0, 1), (2,))}
    whole = decompose([scored], **axes, tau_pos=1.0, tau_neg=1.05)
    write_diagnosis(run, 2, whole, [], behaviour_version=1, current_version=2)
    page = report(run)
    assert page.trace("Shares of the log-ratio's variance", "update")["y"] == [None]
    assert page.chart("Flipped experts between engines")["data"][0]["z"] == [[None]] * 3
    assert page.samples == []
    assert "Up to 100.00% of the server's choices are unknown" in page.text


def test_a_cold_start_has_its_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft", diagnose=False)
    rows = [
        {"step": step, "loss/sft": 1 / step, "grad/norm": 1.0, "time/update_s": 0.375, "time/step_s": 0.5}
        for step in range(1, 201)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(run)
    assert page.trace("Cold-start loss", "loss")["y"] == pytest.approx([1 / step for step in range(1, 201)], rel=1e-5)
    phases = page.chart("Seconds of a step by phase")  # an area: 200 bars would be too thin
    go.Figure(phases)
    assert [trace["stackgroup"] for trace in phases["data"]] == ["all", "all"]
    assert [trace["y"][0] for trace in phases["data"]] == [0.375, 0.125]
    assert "Why ratios vary" not in page.text


def test_a_torn_last_line_of_a_running_run_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", diagnose=False)
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 7, "reward/me')
    assert report(run).trace("Training reward", "reward")["x"] == [1, 2, 4, 5, 6]


def _damage(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("not json\n" + text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl"),
        (lambda run: (run / "config.yaml").unlink(), "no config.yaml"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "holds no step yet"),
        (_damage, "metrics.jsonl:1: not JSON: b'not json"),
        (lambda run: (run / "config.yaml").write_text("- a"), "expected a mapping"),
    ],
)
def test_wrong_directories_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, message: str
) -> None:
    run = make_run(tmp_path / "run", diagnose=False)
    spoil(run)
    assert cli.main(["report", str(run)]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_wrong_arguments_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([tmp_path / "absent"], "absent: no such run directory"),
        ([run.parent], "runs below it: one"),
        ([run, run], "given twice"),
        ([run, "--out", tmp_path], "is a directory"),
        ([run, "--out", tmp_path / "no" / "page.html"], "there is no directory"),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report"])
    assert stopped.value.code == 2
