"""`tools/inspect_checkpoint.py`: what is in a checkpoint, and how two of them differ, as tables or JSON.

Reads arguments and lays out tables; figures.py has the figures, sources.py reads the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megasapo import failures
from megasapo.arguments import Parser
from megasapo.convert import figures
from megasapo.convert.errors import ConvertError
from megasapo.convert.sources import (
    KeySource,
    MegatronSource,
    Source,
    is_megatron,
    model_of,
    record_of,
    refuse_damaged,
    resolved,
    run_settings,
)
from megasapo.geometry import read_config
from megasapo.mcore.bridge.dequantised import DequantisedFiles
from megasapo.mcore.torch_dist import StoredTensors

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Entry of the tool; the process's exit code: 2 for what the user can mend."""
    args = _parser().parse_args(argv)
    try:
        found = inspect(Path(args.checkpoint), args.against and Path(args.against), args.model, brief=args.brief)
        if args.verify:
            _verify(found)
        said = json.dumps(found, indent=1) if args.json else "\n".join(_tables(found, everything=args.all))
        print(said, flush=True)
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        return failures.report("inspect_checkpoint", e)
    return 0


def _verify(found: Row) -> None:
    """Add that the files are as they were written. ConvertError when one is not, or nothing says how it was."""
    for name in ("checkpoint", "against"):
        if name in found:
            directory = Path(found[name]["path"])
            files = record_of(directory).get("files")
            if not files:
                raise ConvertError(
                    f"{directory}: --verify: no record with hashes of its files (megasapo.json) is there"
                )
            refuse_damaged(directory)
            found[name]["verified"] = f"{len(files)} files are as they were written"


def inspect(directory: Path, against: Path | None = None, model: str | None = None, *, brief: bool = False) -> Row:
    """What there is to say of a checkpoint; `against` another: how they differ. `brief`: no tensor is read."""
    directory = resolved(directory)
    source = _open(directory, model)
    found: Row = {"checkpoint": facts(directory) | figures.sizes(source.specs)}
    if against is not None:
        against = resolved(against)
        other = _open(against, model)
        if isinstance(source, KeySource) != isinstance(other, KeySource):
            unknown = directory if isinstance(source, KeySource) else against
            raise ConvertError(f"{unknown}: nothing says which model this is: name its HF directory with --model")
        found["against"] = facts(against) | figures.sizes(other.specs)
        if not brief:
            found["difference"] = figures.differences(source, other)
    elif not brief:
        found["tensors"] = list(figures.norms(source))
        found["experts"] = figures.experts(found["tensors"])
    return found


def facts(directory: Path) -> Row:
    """What a checkpoint's files say without its tensors."""
    files = [path for path in directory.iterdir() if path.is_file()]
    found: Row = {"path": str(directory), "kind": "megatron-core" if is_megatron(directory) else "HF"}
    record = record_of(directory)
    for name in ("step", "format", "world_size", "layout", "converted"):
        if name in record:
            found[name] = record[name]
    run = run_settings(directory) if is_megatron(directory) else None
    if run is not None:
        found["model"] = run["model"]["path"]
    if (directory / "config.json").is_file():
        config = read_config(directory)
        found |= {name: config[name] for name in ("model_type", "dtype", "quantization_config") if name in config}
    return found | {"files": len(files), "file_bytes": sum(path.stat().st_size for path in files)}


def _open(directory: Path, model: str | None) -> Source:
    if not is_megatron(directory):
        return DequantisedFiles(directory)
    try:
        hf_dir = model_of(directory, model)
    except ConvertError:
        if model is not None:
            raise
        return KeySource(StoredTensors(directory))
    return MegatronSource(directory, hf_dir)


def _tables(found: Row, *, everything: bool) -> list[str]:
    lines = []
    for name in ("checkpoint", "against"):
        if name in found:
            told = {key: value for key, value in found[name].items() if key != "dtypes"} | found[name]["dtypes"]
            width = max(map(len, told))
            lines += [f"{key:{width}} {_said(value)}" for key, value in told.items()] + [""]
    if "tensors" in found:
        shown = [row for row in found["tensors"] if everything or not figures.EXPERT.fullmatch(row["name"])]
        hidden = len(found["tensors"]) - len(shown)
        lines += _table(shown, ("name", "shape", "dtype", "norm", "rms", "max_abs", "not_finite"))
        if hidden:
            lines.append(f"and {hidden} of single experts (--all)")
        if found["experts"]:
            columns = ("layer", "weight", "experts", "min", "mean", "max", "spread", "smallest", "largest")
            lines += ["", "norms over the experts of a layer", *_table(found["experts"], columns)]
        broken = {row["name"]: row["not_finite"] for row in found["tensors"] if row["not_finite"]}
        lines += ["", f"{sum(broken.values())} values are not finite{': ' if broken else ''}{_listed(list(broken))}"]
    if "difference" in found:
        lines += _difference(found["difference"], everything)
    return lines


def _difference(found: Row, everything: bool) -> list[str]:
    rows = sorted(found["tensors"], key=_size_of_difference, reverse=True)
    shown = rows if everything else list(filter(figures.differs, rows))[:20]
    lines = [f"{found['equal']} tensors equal, {found['different']} different"]
    if shown:
        lines += _table(shown, ("name", "max_abs", "relative", "not_finite"))
    if len(shown) < found["different"]:
        lines.append(f"the {len(shown)} that differ most; --all shows the others")
    for row in found["shapes_differ"]:
        lines.append(f"{row['name']}: shapes {row['shapes'][0]} and {row['shapes'][1]}")
    for which in ("only_first", "only_second"):
        if found[which]:
            lines.append(f"{which.replace('_', ' in the ')}: {_listed(found[which])}")
    return lines


def _size_of_difference(row: Row) -> tuple[int, float]:
    return row["not_finite"], float("inf") if row["relative"] is None else row["relative"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    cells = [list(columns)] + [[_said(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return _listed(value) if all(isinstance(x, str) for x in value) else "x".join(map(str, value))
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(v)}" for key, v in value.items())
    return str(value)


def _parser() -> Parser:
    parser = Parser(
        prog="inspect_checkpoint.py",
        description="Step, layout, sizes and norms of a checkpoint, HF or megatron-core, or how two of them differ.",
    )
    parser.add_argument("checkpoint", help="an HF directory, a megatron-core checkpoint, or a run's directory (newest)")
    parser.add_argument("against", nargs="?", help="another: tensors are compared under their HF names")
    parser.add_argument("--model", help="HF directory of the model, where a checkpoint does not say which it is of")
    parser.add_argument("--brief", action="store_true", help="without reading a tensor")
    parser.add_argument("--verify", action="store_true", help="compare a checkpoint's files with their SHA-256, too")
    parser.add_argument("--all", action="store_true", help="every tensor, single experts' too")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser
