"""Prompts and demonstrations: what is read, what is refused and how it is named, and a stream that resumes exactly."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megasapo.data.files import DataError, read_records
from megasapo.data.prompts import PromptDataset, PromptStream, epoch_order
from megasapo.data.sft import load_demonstrations
from megasapo.data.tokenizer import load_tokenizer
from megasapo.errors import ConfigError
from megasapo.rollout.limits import check_prompts
from megasapo.sections import DataConfig, SftConfig
from tests.tiny import make_model


class ByteTokenizer:
    """One token a byte, 256 ends; a chat template, as transformers renders it, writes each role's first letter."""

    eos_token_id: int | None = 256
    name_or_path = "bytes"

    def __init__(self, chat_template: str | None = "roles") -> None:
        self.chat_template = chat_template

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        begin = [257] if add_special_tokens else []
        return {"input_ids": [begin + list(text.encode()) for text in texts]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"{m['role'][0]}:{m['content']}|" for m in messages) + "a:"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def dataset(path: Path, tokenizer: Any = None, **settings: Any) -> PromptDataset:
    return PromptDataset(path, tokenizer or ByteTokenizer(), DataConfig(**settings))


def test_a_prompt_that_leaves_no_room_for_a_response_is_named_before_the_run(tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "max_position_embeddings": 10, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    data = dataset(write(tmp_path / "d.jsonl", {"prompt": "1+1", "answer": 2}, {"prompt": "11+11", "answer": 22}))
    check_prompts(str(tmp_path), data, 4)
    with pytest.raises(ConfigError, match=r"d\.jsonl:2: the prompt's 6 tokens \+ rollout\.max_new_tokens=5 exceed"):
        check_prompts(str(tmp_path), data, 5)


def test_text_prompts_get_begin_token_and_keep_other_fields(tmp_path: Path) -> None:
    data = dataset(
        write(
            tmp_path / "d.jsonl", {"prompt": "1+1", "answer": 2, "level": "easy"}, "", {"prompt": "é", "answer": " x"}
        )
    )
    assert [p.input_ids for p in data] == [(257, 49, 43, 49), (257, 0xC3, 0xA9)]
    assert [p.answer for p in data] == ["2", " x"]
    assert [p.index for p in data] == [1, 3]  # lines of the file; the blank one counts
    assert data[0].fields["level"] == "easy"


@pytest.mark.parametrize(
    ("answer", "text"), [(7, "7"), (-2.5, "-2.5"), (3.0, "3.0"), ("", ""), (10**30, "1" + "0" * 30), (1e-7, "1e-07")]
)
def test_answers_become_text(tmp_path: Path, answer: Any, text: str) -> None:
    assert dataset(write(tmp_path / "d.jsonl", {"prompt": "q", "answer": answer}))[0].answer == text


def test_messages_and_templated_text_have_one_rendering(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "hi", "answer": ""},
        {"messages": [{"role": "user", "content": "hi"}], "answer": ""},
        {"prompt": [{"role": "user", "content": "hi"}], "answer": ""},
        {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}], "answer": ""},
    )
    data = dataset(path, apply_chat_template=True, system_prompt="be brief")
    assert [p.text for p in data] == ["s:be brief|u:hi|a:"] * 3 + ["s:own|u:hi|a:"]
    assert data[0].input_ids == tuple(b"s:be brief|u:hi|a:")  # the template brings its own special tokens


def test_real_tokenizer_and_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.tiny import write_tokenizer

    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    data = dataset(write(tmp_path / "d.jsonl", {"prompt": "1 + 1", "answer": 2}), tokenizer, apply_chat_template=True)
    assert data[0].text == "user: 1 + 1\nassistant:"
    assert tokenizer.decode(data[0].input_ids) == data[0].text
    tokenizer.chat_template = "{{ raise_exception('only poems') }}"
    with pytest.raises(DataError, match=r"d\.jsonl:1: the chat template refuses these messages: only poems"):
        dataset(tmp_path / "d.jsonl", tokenizer, apply_chat_template=True)


def test_a_directory_without_a_readable_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind="moe", num_hidden_layers=1)
    assert load_tokenizer(model).eos_token_id is not None
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model: its tokenizer does not load: KeyError: 'added_tokens'$"):
        load_tokenizer(model)
    for path in model.glob("token*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"model: no tokenizer there .*; copy that of the model"):
        load_tokenizer(model)


def test_parquet_reads_like_jsonl(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "answer": "1", "when": date(2026, 1, 2)},
        {"messages": [{"role": "user", "content": "b", "name": "n"}], "answer": "2", "when": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    data = dataset(tmp_path / "d.parquet")
    assert [(p.index, p.text, p.answer) for p in data] == [(1, "u:a|a:", "1"), (2, "u:b|a:", "2")]
    assert "when" not in data[1].fields  # null: as a key that is absent


GOOD = {"prompt": "q", "answer": "1"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": ', "not valid JSON: .* at column"),
        ("prompt,answer", r"not valid JSON: .*; JSONL \(one JSON object a line\) or parquet is read"),
        ("[1]", "expected a JSON object, found list; JSONL"),
        (
            {"question": "q", "answer": 1},
            "has neither 'prompt' nor 'messages', only question, answer: .*prompt_key",
        ),
        ({"prompt": "q"}, "has no 'answer', only prompt: .*data.answer_key"),
        ({"prompt": "q", "answer": None}, "has no 'answer'"),
        ({"prompt": "q", "answer": [1]}, "'answer' must be text or a number, found list"),
        ({"prompt": "q", "answer": True}, "'answer' must be text or a number, found bool"),
        ('{"prompt": "q", "answer": NaN}', "'answer' is nan"),
        ({"prompt": " \n", "answer": 1}, "'prompt' is empty"),
        ({"prompt": 3, "answer": 1}, "'prompt' must be text or a list of messages, found int"),
        ({"messages": [], "answer": 1}, "'messages' must be text or a list of messages, found an empty list"),
        ({"messages": ["hi"], "answer": 1}, r"messages\[0\] must be an object with role and content, found str"),
        ({"messages": [{"role": "user"}], "answer": 1}, r"messages\[0\]\.content must be text, found nothing"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": 1}, "the last message is the assistant's"),
        (
            {"prompt": "q" * 8, "answer": 1},
            "the prompt has 9 tokens, more than data.max_prompt_tokens=8: .*=drop",
        ),
        ('{"answer": ' + "1" * 5000 + "}", "not readable: "),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "d.jsonl", GOOD, bad, GOOD)
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ") + message):
        dataset(path, max_prompt_tokens=8)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        dataset(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="no prompts in it"):
        dataset(write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"no prompts in it \(1 were longer than 1\)"):
        dataset(write(tmp_path / "long.jsonl", GOOD), max_prompt_tokens=1, overlong="drop")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "q", "answer": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not UTF-8"):
        dataset(tmp_path / "latin.jsonl")
    (tmp_path / "other.parquet").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"other\.parquet: not a parquet file, though it is called one"):
        dataset(tmp_path / "other.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"torn\.parquet: not a readable parquet file"):
        dataset(tmp_path / "torn.parquet")
    with pytest.raises(DataError, match="need a chat template and the tokenizer in 'bytes' has none"):
        dataset(write(tmp_path / "d.jsonl", GOOD), ByteTokenizer(chat_template=None), apply_chat_template=True)
    with pytest.raises(DataError, match=r"data\.system_prompt would be lost"):
        dataset(tmp_path / "d.jsonl", system_prompt="be brief")


def test_overlong_dropped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "long one", "answer": 1}, GOOD)
    data = dataset(path, max_prompt_tokens=4, overlong="drop")
    assert (len(data), data.num_dropped, data[0].text) == (1, 1, "q")


@pytest.fixture
def seven(tmp_path: Path) -> PromptDataset:
    return dataset(write(tmp_path / "seven.jsonl", *({"prompt": f"p{i}", "answer": i} for i in range(7))))


def test_every_epoch_is_the_whole_dataset_in_a_new_order(seven: PromptDataset) -> None:
    stream = PromptStream(seven, seed=3, shuffle=True)
    drawn = [stream.next() for _ in range(21)]
    assert [uid for uid, _ in drawn] == list(range(21))
    epochs = [tuple(p.index for _, p in drawn[i : i + 7]) for i in (0, 7, 14)]
    assert all(sorted(e) == list(range(1, 8)) for e in epochs)
    assert len(set(epochs)) == 3


def test_order_is_the_same_everywhere() -> None:
    # Written down once: a change here means that no older run can resume.
    assert epoch_order(8, seed=1, epoch=0).tolist() == ORDER_SEED_1
    assert epoch_order(8, seed=1, epoch=1).tolist() != ORDER_SEED_1
    assert epoch_order(5, seed=1, epoch=9, shuffle=False).tolist() == [0, 1, 2, 3, 4]


ORDER_SEED_1 = [2, 4, 7, 5, 0, 6, 3, 1]


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 20])
def test_stream_resumes_exactly(seven: PromptDataset, taken: int) -> None:
    stream = PromptStream(seven, seed=3, shuffle=True)
    for _ in range(taken):
        stream.next()
    state = json.loads(json.dumps(stream.state()))
    resumed = PromptStream(seven, seed=3, shuffle=True)
    resumed.restore(state)
    assert [resumed.next() for _ in range(30)] == [stream.next() for _ in range(30)]


def test_changed_data_is_refused(tmp_path: Path, seven: PromptDataset) -> None:
    state = PromptStream(seven, seed=3, shuffle=True).state()
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(7)]
    one_less = dataset(write(tmp_path / "a.jsonl", *rows[:6]))
    other_answer = dataset(write(tmp_path / "b.jsonl", *rows[:6], {"prompt": "p6", "answer": 0}))
    with pytest.raises(
        DataError, match="cannot continue from the checkpoint: the number of prompts was 7 and is now 6"
    ):
        PromptStream(one_less, seed=3, shuffle=True).restore(state)
    with pytest.raises(DataError, match="the content of the prompts"):
        PromptStream(other_answer, seed=3, shuffle=True).restore(state)
    with pytest.raises(DataError, match=r"run\.seed was 3 and is now 4"):
        PromptStream(seven, seed=4, shuffle=True).restore(state)
    with pytest.raises(DataError, match=r"data\.shuffle was True and is now False"):
        PromptStream(seven, seed=3, shuffle=False).restore(state)


def test_demonstrations_train_on_response_and_end(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.jsonl",
        {"prompt": "ab", "response": "cd"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    )
    text, chat = load_demonstrations(path, ByteTokenizer(), DataConfig(), SftConfig())
    assert text.tokens.tolist() == [257, *b"ab", *b"cd", 256]
    assert text.loss_mask.tolist() == [False, False, False, True, True, True]
    assert chat.tokens.tolist() == [*b"u:x|a:", *b"y", 256]
    assert chat.loss_mask.tolist() == [False] * 6 + [True, True]
    assert (text.uid, chat.uid, text.advantage) == (0, 1, 1.0)
    assert (text.tokens.dtype, text.loss_mask.dtype, text.rollout_logp.tolist()) == (np.int32, np.bool_, [0.0] * 6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "q"}, "has no 'response', only prompt"),
        ({"prompt": "q", "response": ""}, "the response must be text, found an empty one"),
        ({"prompt": "q", "response": 4}, "the response must be text, found int"),
        ({"prompt": "q", "response": "123456"}, "prompt and response have 9 tokens, more than sft.max_tokens=8"),
        (
            {"messages": [{"role": "assistant", "content": "y"}]},
            "'messages' must be text or a list of messages",
        ),
    ],
)
def test_malformed_demonstrations_are_named(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "s.jsonl", {"prompt": "q", "response": "r"}, bad)
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ") + message):
        load_demonstrations(path, ByteTokenizer(), DataConfig(), SftConfig(max_tokens=8))


def test_demonstrations_need_an_end_token(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(DataError, match="has no end-of-sequence token"):
        load_demonstrations(write(tmp_path / "s.jsonl", GOOD), tokenizer, DataConfig(), SftConfig())


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}')
    assert list(read_records(tmp_path / "bom.jsonl")) == [(1, {"a": 1}), (2, {"a": 2})]
