"""Puts the parts into one HTML page that needs nothing but itself: plotly's script, styles and data are in it.

The page's own policy forbids it every request and every script but its two. Text from data is escaped by the template,
data for scripts is JSON without a `<`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from megasapo import __version__
from megasapo.report.curves import cold_start, learning, update
from megasapo.report.experts import experts
from megasapo.report.facts import facts, stability
from megasapo.report.figures import RUN_COLOURS
from megasapo.report.phases import phases
from megasapo.report.ratios import variance
from megasapo.report.read import Run
from megasapo.report.samples import samples


def render(runs: Sequence[Run]) -> str:
    """The whole page."""
    import jinja2
    import markupsafe
    from plotly.offline import get_plotlyjs

    parts = [facts, learning, update, variance, experts, stability, phases, samples]
    if all(run.is_cold_start for run in runs):
        parts = [facts, cold_start, phases]
    scripts = [get_plotlyjs(), _file("page.js")]
    for script in scripts:
        assert "</script" not in script.lower(), "a script that would end its own element"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["data"] = lambda value: markupsafe.Markup(_json(value))
    return environment.from_string(_file("page.html")).render(
        version=__version__,
        runs=[{"label": run.label, "colour": RUN_COLOURS[i % len(RUN_COLOURS)]} for i, run in enumerate(runs)],
        configs=[_config(run) for run in runs],
        sections=[part(runs) for part in parts],
        style=markupsafe.Markup(_file("page.css")),
        scripts=[markupsafe.Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
    )


def _file(name: str) -> str:
    return files("megasapo.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """As Content-Security-Policy names a script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _config(run: Run) -> str:
    import yaml

    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
