"""`megasapo report`: one self-contained HTML page about one run, or several laid over one another.

read.py reads run directories, curves.py, ratios.py, experts.py, phases.py and samples.py make the parts, page.py the
page. Everything is read from files: no model, no torch, no network, and the page asks for nothing either.
"""

from __future__ import annotations

from pathlib import Path

from megasapo.arguments import Parser
from megasapo.errors import UserError
from megasapo.placed import placed
from megasapo.report.page import render
from megasapo.report.read import read_runs


def main(argv: list[str]) -> int:
    """Entry of the command; prints where the page is. UserError: a run that is not there, an output that cannot be."""
    parser = Parser(
        prog="megasapo report",
        description="One self-contained HTML page about one run, or several laid over one another.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="run directories of `megasapo train`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run directory")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs)
    out: Path = args.out or args.runs[0] / "report.html"
    if out.is_dir():
        raise UserError(f"--out {out} is a directory: name a file, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {out.parent}")
    page = render(runs)
    with placed(out) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser, it needs no network")
    return 0
