"""`megasapo report`: one self-contained HTML page about one run, or several laid over one another.

read.py reads run directories, curves.py, ratios.py, experts.py, phases.py and samples.py make the parts, page.py the
page. Everything is read from files: no model, no torch, no network, and the page asks for nothing either.
"""

from __future__ import annotations

from megasapo.report.command import main

__all__ = ["main"]
