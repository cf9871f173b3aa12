"""What a page is made of: sections of charts, tables and samples. Built by the parts, drawn by page.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megasapo.report.figures import Figure


@dataclass(frozen=True)
class Chart:
    """A figure with its title and the sentence that says what to look for."""

    title: str
    look: str
    figure: Figure
    wide: bool = False
    note: str = ""
    kind: str = "chart"


@dataclass(frozen=True)
class Table:
    title: str
    look: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    wide: bool = True
    kind: str = "table"


@dataclass(frozen=True)
class Samples:
    """Responses with their tokens; the page's script colours them."""

    data: dict[str, Any]
    kind: str = "samples"


Block = Chart | Table | Samples


@dataclass(frozen=True)
class Part:
    """Blocks about all runs (run None) or about one of them, and sentences about what is left out."""

    blocks: list[Block]
    missing: list[str] = field(default_factory=list)
    run: int | None = None


@dataclass(frozen=True)
class Section:
    name: str  # of the anchor
    title: str
    intro: str
    parts: list[Part]
