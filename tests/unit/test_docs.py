"""What the pages point to is there: files, headings, and the README's commands."""

from __future__ import annotations

import asyncio
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from megasapo import config
from megasapo.cli import COMMANDS
from megasapo.data.prompts import PromptDataset
from megasapo.data.tokenizer import load_tokenizer
from megasapo.rewards.model import RewardModel
from megasapo.sections import DataConfig, RewardConfig
from megasapo.types import Prompt
from tests.tiny import make_model

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


def fenced(page: str, language: str) -> str:
    """The first block of that language on a page of docs/."""
    found = re.search(rf"^```{language}\n(.*?)^```$", (ROOT / "docs" / page).read_text(), flags=re.M | re.S)
    assert found is not None
    return found[1]


def test_rows_of_the_page_on_data_are_read(tmp_path: Path) -> None:
    make_model(tmp_path / "model", kind="moe", num_hidden_layers=1)
    (tmp_path / "rows.jsonl").write_text(fenced("data.md", "json"))
    rows = PromptDataset(tmp_path / "rows.jsonl", load_tokenizer(str(tmp_path / "model")), DataConfig())
    assert [row.answer for row in rows.prompts] == ["2", "4"]
    assert rows[0].text.startswith("What is 1 + 1?")  # as it is
    assert rows[1].text.endswith("assistant\n")  # rendered
    assert rows[1].fields["source"] == "made up"


def test_verls_files_become_what_the_page_on_data_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    make_model(tmp_path / "model", kind="moe", num_hidden_layers=1)
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "1+1="}]
    row = {"data_source": "x", "prompt": messages, "reward_model": {"style": "rule", "ground_truth": "2"}}
    pandas.DataFrame([row, row]).to_parquet("verl.parquet")
    lines = (ROOT / "docs" / "data.md").read_text().partition("a parquet file made for verl")[2].splitlines()[1:4]
    exec(textwrap.dedent("\n".join(lines)), {"pandas": pandas})
    rows = PromptDataset("train.parquet", load_tokenizer("model"), DataConfig())
    assert [row.answer for row in rows.prompts] == ["2", "2"]
    assert rows[0].text.endswith("assistant\n")


def test_the_reward_of_the_page_on_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(fenced("data.md", "python"))
    monkeypatch.chdir(tmp_path)
    settings = re.search(r"^    reward:\n(?:      .*\n)+", (ROOT / "docs" / "data.md").read_text(), flags=re.M)
    assert settings is not None
    cfg = RewardConfig(**yaml.safe_load(settings[0])["reward"])

    async def score() -> list[dict[str, float]]:
        async with RewardModel(cfg) as model:
            responses = ("<think>one more</think> it is 2", "2" * 101, "three")
            return [dict(s.parts) for s in await model.score_group(Prompt(1, (1,), "1 + 1?", "2"), responses)]

    assert asyncio.run(score()) == [
        {"math": 1, "format": 1, "my_rewards:short_and_right": 1},
        {"math": 0, "format": 0, "my_rewards:short_and_right": 0.5},
        {"math": 0, "format": 0, "my_rewards:short_and_right": 0},
    ]
