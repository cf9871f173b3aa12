"""Run directories for tests of `megasapo report`, and what a browser would make of its page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
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
            diagnose_step(directory, step, rng, fp8=step >= fp8_from)
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


def scored_sequence(uid: int, rng: np.random.Generator, *, spread: float = 0.3, fp8: bool = False) -> ScoredSequence:
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


def diagnose_step(directory: Path, step: int, rng: np.random.Generator, *, fp8: bool = False) -> None:
    scored = [scored_sequence(uid, rng, fp8=fp8) for uid in (4, 5, 7)]
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


def names_of(figure: dict[str, Any]) -> list[str]:
    return [trace["name"] for trace in figure["data"]]
