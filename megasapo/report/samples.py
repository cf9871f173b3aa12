"""Responses of the latest diagnosis with the numbers of every token, for the page's script to colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megasapo.report.blocks import Block, Part, Samples, Section
from megasapo.report.figures import rounded
from megasapo.report.read import Run

TOKENS_SHOWN = 4000  # of one response: more would make the page slow
NUMBERS = ("log_ratio", "engine", "fp8", "mismatch", "update", "drift", "gate", "rollout_logp")  # fp8: of some runs
COUNTS = ("position", "token_id", "flips_mismatch", "flips_drift")


def samples(runs: Sequence[Run]) -> Section:
    """Side by side by prompt, run by run."""
    parts, missing = [], []
    for i, run in enumerate(runs):
        if run.tokens_step is None:
            missing.append(run.label)
            continue
        blocks: list[Block] = [Samples(_samples(run))]
        parts.append(Part(blocks, run=i))
    intro = (
        "The tokens of some responses of the latest diagnosed step. Switch what the colour says; point at a token for "
        "its numbers. A few strong colours are outliers; whole stretches are contexts that the engines see differently."
    )
    if missing:
        who = "" if len(runs) == 1 else f" for {', '.join(missing)}"
        parts.append(
            Part([], [f"Samples by token{who}: set routing.diagnose_every, and routing.diagnose_samples above 0."])
        )
    return Section("samples", "Samples", intro if len(missing) < len(runs) else "", parts)


def _samples(run: Run) -> dict[str, Any]:
    columns = run.tokens
    rows_of: dict[int, list[int]] = {}
    for row, uid in enumerate(columns["uid"]):
        rows_of.setdefault(uid, []).append(row)
    group_size = int(run.setting("rollout.group_size", 1))
    groups: dict[int, list[dict[str, Any]]] = {}
    for uid in sorted(rows_of):
        groups.setdefault(uid // group_size, []).append(_sample(run, uid, rows_of[uid]))
    return {
        "step": run.tokens_step,
        "span": _span(columns["log_ratio"]),
        "groups": [
            {"prompt": _of_prompt(run, rows, "prompt"), "answer": _of_prompt(run, rows, "answer"), "samples": rows}
            for rows in groups.values()
        ],
    }


def _sample(run: Run, uid: int, rows: list[int]) -> dict[str, Any]:
    shown = rows[:TOKENS_SHOWN]
    columns = run.tokens
    rollout = run.rollouts.get(uid, {})
    return {
        "uid": uid,
        "reward": rounded([columns["reward"][rows[0]]])[0],
        "advantage": rounded([columns["advantage"][rows[0]]])[0],
        "finish": rollout.get("finish_reason"),
        "all": len(rows),
        "token": [str(columns["token"][row]) for row in shown],
        **{name: rounded([columns[name][row] for row in shown]) for name in NUMBERS if name in columns},
        **{name: [columns[name][row] for row in shown] for name in COUNTS},
    }


def _of_prompt(run: Run, rows: list[dict[str, Any]], what: str) -> str | None:
    found = [run.rollouts[row["uid"]].get(what) for row in rows if row["uid"] in run.rollouts]
    return str(found[0]) if found else None


def _span(log_ratios: Sequence[float | None]) -> float:
    """Where the colours of log-ratios saturate: 99 of 100 tokens lie within."""
    sizes = sorted(abs(x) for x in rounded(log_ratios) if x is not None)
    return max(1e-6, float(f"{sizes[min(len(sizes) - 1, int(0.99 * len(sizes)))]:.2g}")) if sizes else 1.0
