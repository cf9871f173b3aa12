"""What can be said of a checkpoint's tensors: sizes, norms, how experts differ, how two checkpoints differ.

Called by inspect_command.py. Reads a source tensor by tensor; gives plain dictionaries, which are JSON.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from megasapo.convert.sources import Source
from megasapo.hf_files import TensorSpec

EXPERT = re.compile(r"(?P<before>.*layers\.(?P<layer>\d+)\..*experts\.)(?P<expert>\d+)\.(?P<what>.+)")
FUSED = re.compile(r".*layers\.(?P<layer>\d+)\..*experts\.(?P<what>[^.]*)")  # one tensor of all experts
ROUTER = re.compile(r".*layers\.(?P<layer>\d+)\..*\b(gate|router)\.weight")

Row = dict[str, Any]


def sizes(specs: Iterable[TensorSpec]) -> Row:
    """Tensors, parameters and bytes, in all and by dtype."""
    by_dtype: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for spec in specs:
        counts = by_dtype[str(spec.dtype).removeprefix("torch.")]
        for i, n in enumerate((1, prod(spec.shape), spec.nbytes)):
            counts[i] += n
    names = ("tensors", "parameters", "bytes")
    totals = [sum(counts[i] for counts in by_dtype.values()) for i in range(3)]
    dtypes = {dtype: dict(zip(names, counts, strict=True)) for dtype, counts in by_dtype.items()}
    return dict(zip(names, totals, strict=True)) | {"dtypes": dtypes}


def norms(source: Source) -> Iterator[Row]:
    """Of each tensor: shape, dtype, how many values are not finite; of those that are norm, rms, largest magnitude.

    `parts`: of experts stored as one tensor and of a router the norm of each expert's rows.
    """
    for spec in source.specs:
        tensor = source.read(spec.name).double()
        row: Row = {"name": spec.name, "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        not_finite = int((~torch.isfinite(tensor)).sum())
        if not_finite:
            tensor = tensor.nan_to_num(0, 0, 0)
        row |= {
            "norm": _norm(tensor),
            "rms": _norm(tensor) / max(1, tensor.numel()) ** 0.5,
            "max_abs": tensor.abs().max().item() if tensor.numel() else 0.0,
            "not_finite": not_finite,
        }
        is_fused = EXPERT.fullmatch(spec.name) is None and FUSED.fullmatch(spec.name) is not None
        if is_fused or ROUTER.fullmatch(spec.name):
            row["parts"] = tensor.flatten(1).norm(dim=1).tolist() if tensor.dim() > 1 else tensor.abs().tolist()
        yield row


def experts(rows: Iterable[Row]) -> list[Row]:
    """By layer and weight, how the norms of its experts (of a router: of its rows) are spread.

    `spread` is the standard deviation in units of the mean; `smallest` and `largest` name the experts.
    """
    groups: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if found := EXPERT.fullmatch(row["name"]):
            groups[int(found["layer"]), found["what"]][int(found["expert"])] = row["norm"]
        elif "parts" in row and (found := ROUTER.fullmatch(row["name"]) or FUSED.fullmatch(row["name"])):
            what = found.groupdict().get("what", "router")
            groups[int(found["layer"]), what] = dict(enumerate(row["parts"]))
    return [_spread(layer, what, by_expert) for (layer, what), by_expert in groups.items()]


def differences(first: Source, second: Source) -> Row:
    """Tensor by tensor: the largest absolute difference, and the difference's norm in units of the first's.

    That is None where the first is zero. `not_finite`: how many values are not in one of them and differ; the others
    count for the difference. Names that only one has, and tensors of different shapes, are listed apart.
    """
    shapes = {spec.name: spec.shape for spec in second.specs}
    rows: list[Row] = []
    mismatched: list[Row] = []
    for spec in first.specs:
        if spec.name not in shapes:
            continue
        if shapes[spec.name] != spec.shape:
            mismatched.append({"name": spec.name, "shapes": [list(spec.shape), list(shapes[spec.name])]})
            continue
        rows.append({"name": spec.name} | _difference(first.read(spec.name).double(), second.read(spec.name).double()))
    names = {spec.name for spec in first.specs}
    return {
        "tensors": rows,
        "equal": sum(not differs(row) for row in rows),
        "different": sum(differs(row) for row in rows),
        "shapes_differ": mismatched,
        "only_first": sorted(names - shapes.keys()),
        "only_second": sorted(shapes.keys() - names),
    }


def differs(row: Row) -> bool:
    """Whether a row of `differences` says so."""
    return bool(row["max_abs"] or row["not_finite"])


def _difference(before: Tensor, after: Tensor) -> Row:
    finite = torch.isfinite(before) & torch.isfinite(after)
    not_finite = 0
    if not bool(finite.all()):
        not_finite = int((~finite & (before != after) & ~(before.isnan() & after.isnan())).sum())
        before, after = (torch.where(finite, tensor, 0) for tensor in (before, after))
    change, norm = after - before, _norm(before)
    size = _norm(change)
    return {
        "max_abs": change.abs().max().item() if change.numel() else 0.0,
        "relative": size / norm if norm else (None if size else 0.0),
        "not_finite": not_finite,
    }


def _spread(layer: int, what: str, by_expert: dict[int, float]) -> Row:
    values = torch.tensor(list(by_expert.values()), dtype=torch.float64)
    indices = list(by_expert)
    mean = values.mean().item()
    return {
        "layer": layer,
        "weight": what,
        "experts": len(indices),
        "min": values.min().item(),
        "mean": mean,
        "max": values.max().item(),
        "spread": values.std(correction=0).item() / mean if mean else 0.0,
        "smallest": indices[int(values.argmin())],
        "largest": indices[int(values.argmax())],
    }


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
