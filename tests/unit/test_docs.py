"""What the pages point to is there: files, headings, and the README's commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megasapo import config
from megasapo.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm" / "README.md"]
PAGES += sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/README.md")])


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_that_are_named_exist(page: Path) -> None:
    sections = {name: field.annotation.model_fields for name, field in config.Config.model_fields.items()}  # type: ignore[union-attr]
    named = set(re.findall(rf"\b({'|'.join(sections)})\.([a-z_0-9]+)=", page.read_text()))
    assert [f"{section}.{name}" for section, name in named if name not in sections[section]] == []


def test_the_readme_has_every_command_but_the_batch_scripts() -> None:
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^    megasapo (\w+)", text, flags=re.M)) == COMMANDS.keys() - {
        "cluster"
    }  # the batch script's
