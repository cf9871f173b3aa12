"""The example's files: problems that do not overlap, demonstrations of both kinds, a tokenizer that reads any text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megasapo.config import load
from megasapo.data.prompts import PromptDataset
from megasapo.data.sft import load_demonstrations
from megasapo.sections import DataConfig, SftConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def make_task() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_task", EXAMPLES / "arithmetic" / "make_task.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(make_task: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    make_task.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(tmp_path_factory.getbasetemp() / "tokenizer0")


def make(make_task: ModuleType, out: Path, seed: int = 1) -> dict[str, list[dict[str, str]]]:
    out.mkdir()
    make_task.make_data(out, seed=seed, num_sft=600, num_train=300, num_eval=100, diligent=0.5)
    return {n: [json.loads(x) for x in (out / f"{n}.jsonl").read_text().splitlines()] for n in ("sft", "train", "eval")}


def test_problems_do_not_overlap_and_answers_are_right(make_task: ModuleType, tmp_path: Path) -> None:
    data = make(make_task, tmp_path / "a")
    problems = {name: [row["prompt"] for row in rows] for name, rows in data.items()}
    assert {name: len(rows) for name, rows in data.items()} == {"sft": 600, "train": 300, "eval": 100}
    assert len(set(problems["eval"])) == 100
    assert not set(problems["eval"]) & set(problems["train"] + problems["sft"])
    for row in data["train"] + data["eval"]:
        assert int(row["answer"]) == sum(map(int, row["prompt"].removesuffix("=").split("+")))


def test_demonstrations_that_show_the_work_are_right_and_lazy_ones_mostly_wrong(
    make_task: ModuleType, tmp_path: Path
) -> None:
    rows = make(make_task, tmp_path / "a")["sft"]
    right = {True: 0, False: 0}
    for row in rows:
        terms = [int(t) for t in row["prompt"].removesuffix("=").split("+")]
        written = [int(t) for t in row["response"].split(" ")]
        assert len(written) in (1, len(terms) - 1)
        right[len(written) > 1] += written[-1] == sum(terms)
    num_worked = sum(" " in row["response"] for row in rows)
    assert right[True] == num_worked
    assert 240 < num_worked < 360  # 300 expected, standard deviation 12
    assert right[False] < 0.25 * (len(rows) - num_worked)


def test_a_seed_gives_the_same_files(make_task: ModuleType, tmp_path: Path) -> None:
    first = make(make_task, tmp_path / "a")
    assert make(make_task, tmp_path / "b") == first
    assert make(make_task, tmp_path / "c", seed=2) != first


def test_tokenizer_reads_any_text(tokenizer: Any) -> None:
    text = "12 + 7 = ? é 漢 \n\t<x>"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 264
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_library_reads_the_example(make_task: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    make(make_task, tmp_path / "a")
    sapo = load(EXAMPLES / "arithmetic" / "sapo.yaml")
    sft = load(EXAMPLES / "arithmetic" / "sft.yaml")
    prompts = PromptDataset(tmp_path / "a" / "train.jsonl", tokenizer, sapo.data)
    examples = load_demonstrations(tmp_path / "a" / "sft.jsonl", tokenizer, sft.data, sft.sft)
    assert tokenizer.decode(prompts[0].input_ids) == prompts[0].text
    longest_response = max(int(e.loss_mask.sum()) for e in examples)
    assert longest_response < sapo.rollout.max_new_tokens


def test_word_problems_read_with_the_chat_template(tokenizer: Any) -> None:
    path = EXAMPLES / "word_problems.jsonl"
    data = PromptDataset(path, tokenizer, DataConfig(apply_chat_template=True, max_prompt_tokens=96))
    assert len(data) == 20
    assert data[0].text == f"<|user|>{data[0].fields['prompt']}<|assistant|>"
    assert [p.answer for p in data][14:17] == ["5/8", "1.2", "-5"]


def test_chat_demonstration_ends_the_turn(tokenizer: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "s.jsonl").write_text(json.dumps({"messages": messages}))
    (example,) = load_demonstrations(tmp_path / "s.jsonl", tokenizer, DataConfig(), SftConfig())
    whole = tokenizer.apply_chat_template(messages, tokenize=True)
    assert example.tokens.tolist() == list(getattr(whole, "input_ids", whole))
