"""How far two runs of one step are apart: one relative error a column, the first tensor beyond tolerance, and a table.

Pure functions of what `parity_step.run` returned; used by test_parity.py and by the writer of docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = 1e-5
COLUMNS = ("loss", "logprobs", "grad norm", "gradients", "weights", "statistics")
# Statistics that are sums with both signs, or variances of small numbers: compared with the size of their terms.
STATISTICS_SCALE = 0.1


@dataclass(frozen=True)
class Difference:
    """The largest relative error of a column, and the first place in model order that is beyond tolerance."""

    error: float
    first: str | None


def compare(
    got: Mapping[str, Any], reference: Mapping[str, Any], before: Mapping[str, torch.Tensor]
) -> dict[str, Difference]:
    """By column. `before`: the weights that both steps started from."""
    return {column: _column(pairs) for column, pairs in _pairs(got, reference, before).items()}


def failures(found: Mapping[str, Difference], copies: list[str]) -> list[str]:
    """What is beyond tolerance, a line for each column, in the order in which a step computes them."""
    lines = [f"{column}: {found[column].first}" for column in COLUMNS if found[column].first is not None]
    return lines + [f"copies of one tensor differ: {line}" for line in copies[:3]]


def relative(got: torch.Tensor, reference: torch.Tensor, scale: float) -> float:
    """max |got - reference| / scale, in fp64; infinite where one is not finite or a zero tensor is not zero."""
    if got.shape != reference.shape or not torch.isfinite(got).all():
        return float("inf")
    if not got.numel():
        return 0.0
    apart = float((got.double() - reference.double()).abs().max())
    if apart == 0:
        return 0.0
    return apart / scale if scale else float("inf")


Pairs = Iterator[tuple[str, float]]  # what, and its error


def _pairs(
    got: Mapping[str, Any], reference: Mapping[str, Any], before: Mapping[str, torch.Tensor]
) -> dict[str, Pairs]:
    return {
        "loss": iter([("the loss", _scalar(got["loss"], reference["loss"]))]),
        "logprobs": _logprobs(got["logp"], reference["logp"]),
        "grad norm": iter([("the total gradient norm", _scalar(got["grad_norm"], reference["grad_norm"]))]),
        "gradients": _tensors(got["gradients"], reference["gradients"], {}),
        "weights": _tensors(got["weights"], reference["weights"], before),
        "statistics": _statistics(got["stats"], reference["stats"]),
    }


def _column(pairs: Pairs) -> Difference:
    worst, first = 0.0, None
    for what, error in pairs:
        worst = max(worst, error)
        if first is None and not error <= TOLERANCE:
            first = f"{what} is off by {error:.1e}"
    return Difference(worst, first)


def _scalar(got: float, reference: float, floor: float = 0.0) -> float:
    return relative(torch.tensor(got).double(), torch.tensor(reference).double(), max(abs(reference), floor))


def _logprobs(got: Mapping[str, Any], reference: Mapping[str, Any]) -> Pairs:
    """Of each sequence, relative to its largest: the rounding of a sum of exponentials is that of the largest logit."""
    for which, by_uid in reference.items():
        if got[which].keys() != by_uid.keys():
            yield f"{which} logprobs are of sequences {sorted(got[which])}, not {sorted(by_uid)}: it", float("inf")
            continue
        for uid in sorted(by_uid):
            error = relative(got[which][uid], by_uid[uid], float(by_uid[uid].abs().max()))
            yield f"{which} logprobs of sequence {uid}", error


def _tensors(got: Mapping[str, Any], reference: Mapping[str, Any], origin: Mapping[str, torch.Tensor]) -> Pairs:
    """In model order; each relative to its largest entry, or to the largest distance from `origin`."""
    if list(got) != list(reference):
        yield f"the tensors {sorted(got.keys() ^ reference.keys())} or their order: it", float("inf")
        return
    for name, value in reference.items():
        moved = value if name not in origin else value - origin[name]
        yield name, relative(got[name], value, float(moved.abs().max()))


def _statistics(got: Mapping[str, float], reference: Mapping[str, float]) -> Pairs:
    for name, value in sorted(reference.items()):
        yield name, _scalar(got.get(name, float("nan")), value, STATISTICS_SCALE)


def table(rows: Mapping[str, Mapping[str, Difference]]) -> str:
    """Markdown: a row for each layout, its largest error in each column."""
    lines = ["| layout | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, found in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{found[c].error:.1e}" for c in COLUMNS) + " |")
    return "\n".join(lines)
