"""`megasapo report` of several runs, and of runs that are short, bare, odd or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from megasapo import cli
from megasapo.routing.decompose import decompose
from megasapo.routing.scored import ScoredSequence
from megasapo.routing.store import write_diagnosis
from tests.unit.report_page import diagnose_step, diagnoses_of, make_run, names_of, report, rows_of, scored_sequence


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
    scored = scored_sequence(4, np.random.default_rng(0), spread=0.0)
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


def test_a_run_without_phases_beside_one_that_has_them(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", diagnose=False), make_run(tmp_path / "two", name="two", diagnose=False)
    rows = [{name: x for name, x in row.items() if not name.startswith("time/")} for row in rows_of(two)]
    (two / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    medians = report(one, two).chart("Seconds of a step by phase, median")
    (rollout,) = [trace["x"] for trace in medians["data"] if trace["name"] == "rollout"]
    assert rollout == [pytest.approx(np.median([row["time/rollout_s"] for row in rows_of(one)]), rel=1e-5), 0.0]


def test_events_of_every_step_are_one_shape_and_none_where_steps_are_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", diagnose=False)
    diagnose_step(run, 4, np.random.default_rng(0))
    lines = [
        json.dumps({"step": step, "metric": "m", "value": 1, "why": "w", "action": "a"}) for step in range(1, 5001)
    ]
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    page = report(run)
    (marks,) = page.chart("Training reward")["layout"]["shapes"]
    assert marks["path"].count("V1") == 5000
    shares = page.chart("Shares of the log-ratio's variance")["layout"]
    assert shares["xaxis"]["type"] == "category"
    assert "shapes" not in shares
    for (figure,) in page.charts.values():
        go.Figure(figure)


def test_a_cold_start_has_its_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sft", diagnose=False)
    rows = [
        {"step": step, "loss/sft": 1 / step, "grad/norm": 1.0, "time/update_s": 0.375, "time/step_s": 0.5}
        for step in range(1, 201)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (run / "config.yaml").open("a") as settings:
        settings.write("\nsft: {batch_size: 64, data: d.jsonl}\n")
    page = report(run)
    assert page.trace("Cold-start loss", "loss")["y"] == pytest.approx([1 / step for step in range(1, 201)], rel=1e-5)
    phases = page.chart("Seconds of a step by phase")  # an area: 200 bars would be too thin
    go.Figure(phases)
    assert [trace["stackgroup"] for trace in phases["data"]] == ["all", "all"]
    assert [trace["y"][0] for trace in phases["data"]] == [0.375, 0.125]
    assert "Why ratios vary" not in page.text
    assert "64 demonstrations of d.jsonl" in page.text
    assert "ratios measured from" not in page.text


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


def test_wrong_arguments_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs" / "one", diagnose=False)
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
