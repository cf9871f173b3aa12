"""Problems to roll out: a file of prompts, tokenised and checked at start, and an endless stream that resumes exactly.

Called by the rollout source and by evaluate. Knows tokenizers, not models, servers or ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megasapo.data.files import DataError, batched, read_records
from megasapo.sections import DataConfig
from megasapo.types import Prompt


class PromptDataset:
    """The prompts of one file, in file order; `num_dropped` were over-long and left out (`overlong: drop`).

    `tokenizer` is a transformers tokenizer. Raises DataError with file and line at the first malformed record.
    """

    def __init__(self, path: str | Path, tokenizer: Any, cfg: DataConfig) -> None:
        self.path = Path(path)
        self.num_dropped = 0
        self.prompts: list[Prompt] = []
        for rows in batched(read_records(self.path)):
            self._add(rows, tokenizer, cfg)
        if not self.prompts:
            left_out = f" ({self.num_dropped} were longer than {cfg.max_prompt_tokens})" if self.num_dropped else ""
            raise DataError(f"{self.path}: no prompts in it{left_out}")
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(_canonical(prompt))
        self.fingerprint = digest.hexdigest()  # changes with any prompt, answer, field, or with the tokenizer

    def _add(self, rows: list[tuple[int, dict[str, Any]]], tokenizer: Any, cfg: DataConfig) -> None:
        rendered = [render_prompt(record, f"{self.path}:{line}", tokenizer, cfg) for line, record in rows]
        answers = [read_answer(record, f"{self.path}:{line}", cfg.answer_key) for line, record in rows]
        for (line, record), text, answer, ids in zip(rows, rendered, answers, tokenise(tokenizer, rendered)):
            if not _fits(ids, f"{self.path}:{line}", cfg):
                self.num_dropped += 1
                continue
            self.prompts.append(Prompt(index=line, input_ids=ids, text=text.text, answer=answer, fields=record))

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> Prompt:
        return self.prompts[i]


class PromptStream:
    """Prompts without end: every epoch is the whole dataset once, in a new order drawn from (seed, epoch).

    `next()` gives (uid, prompt); uids count the prompts drawn since the run began. `restore(state())` resumes exactly.
    """

    def __init__(self, dataset: PromptDataset, seed: int, shuffle: bool) -> None:
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle
        self._uid = self._epoch = self._position = 0
        self._order = self._new_order()

    def next(self) -> tuple[int, Prompt]:
        if self._position == len(self.dataset):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._new_order()
        uid, prompt = self._uid, self.dataset[int(self._order[self._position])]
        self._uid, self._position = uid + 1, self._position + 1
        return uid, prompt

    def state(self) -> dict[str, Any]:
        """Everything `restore` needs, as JSON values."""
        return {
            "uid": self._uid,
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_prompts": len(self.dataset),
            "fingerprint": self.dataset.fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises DataError if the data or the order would not be the same."""
        now = self.state()
        for key, what in (
            ("num_prompts", "the number of prompts"),
            ("fingerprint", "the content of the prompts (or the tokenizer, or a data.* setting)"),
            ("seed", "run.seed"),
            ("shuffle", "data.shuffle"),
        ):
            if state[key] != now[key]:
                raise DataError(
                    f"{self.dataset.path}: cannot continue from the checkpoint: {what} was {state[key]} and is now "
                    f"{now[key]}; put it back as it was, or start a new run with another run.name"
                )
        self._uid, self._epoch, self._position = int(state["uid"]), int(state["epoch"]), int(state["position"])
        self._order = self._new_order()

    def _new_order(self) -> np.ndarray:
        return epoch_order(len(self.dataset), self.seed, self._epoch, self.shuffle)


def epoch_order(num: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """[num] int64: the order of one epoch. The same on every machine, python and numpy version."""
    if not shuffle:
        return np.arange(num, dtype=np.int64)
    # Only a bit generator's raw stream is promised to stay the same from one numpy to the next; permutation() is not.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num)
    return np.argsort(keys, kind="stable")


@dataclass(frozen=True, slots=True)
class Rendered:
    """What is tokenised. Plain text gets what the tokenizer puts around text, such as a begin-of-sequence token."""

    text: str
    is_plain: bool


def render_prompt(record: dict[str, Any], where: str, tokenizer: Any, cfg: DataConfig) -> Rendered:
    """A record's prompt as text, chat template applied where it belongs. `where` opens every complaint."""
    messages = read_messages(record, where, cfg)
    if isinstance(messages, str):
        if cfg.system_prompt is not None:
            raise DataError(
                f"{where}: {cfg.prompt_key!r} is plain text, so data.system_prompt would be lost: "
                "set data.apply_chat_template=true or remove data.system_prompt"
            )
        return Rendered(messages, is_plain=True)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last message is the assistant's: there is nothing to answer")
    return Rendered(apply_template(messages, where, tokenizer), is_plain=False)


def tokenise(tokenizer: Any, rendered: Sequence[Rendered]) -> list[tuple[int, ...]]:
    """The token ids of each text, in order; tokenizers take many texts ten times faster than one by one."""
    ids: list[tuple[int, ...]] = [()] * len(rendered)
    for is_plain in (True, False):
        at = [i for i, r in enumerate(rendered) if r.is_plain is is_plain]
        if at:
            encoded = tokenizer([rendered[i].text for i in at], add_special_tokens=is_plain)["input_ids"]
            for i, tokens in zip(at, encoded):
                ids[i] = tuple(tokens)
    return ids


def apply_template(messages: list[dict[str, str]], where: str, tokenizer: Any) -> str:
    """The messages as the tokenizer's chat template renders them, up to where the assistant begins."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: chat messages need a chat template and the tokenizer in {tokenizer.name_or_path!r} has none: "
            "add chat_template.jinja to it, or give plain text prompts with data.apply_chat_template=false"
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as e:
        raise DataError(f"{where}: the chat template refuses these messages: {e}") from e


def read_messages(record: dict[str, Any], where: str, cfg: DataConfig) -> str | list[dict[str, str]]:
    """A record's prompt as plain text, or as messages if it has those or the chat template is to be applied.

    The prompt key (text or messages) goes before the messages key. A record's own system message is kept as it is;
    data.system_prompt is put before messages that have none.
    """
    key = cfg.prompt_key if record.get(cfg.prompt_key) is not None else cfg.messages_key
    value = record.get(key)
    if value is None:
        raise DataError(
            f"{where}: has neither {cfg.prompt_key!r} nor {cfg.messages_key!r}, only {', '.join(record) or 'nothing'}: "
            "name the right field with data.prompt_key or data.messages_key"
        )
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: {key!r} is empty")
        if not cfg.apply_chat_template:
            return value
        value = [{"role": "user", "content": value}]
    messages = _check_messages(value, key, where)
    if cfg.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": cfg.system_prompt})
    return messages


def read_answer(record: dict[str, Any], where: str, key: str) -> str:
    """A record's answer as text; numbers are written as Python writes them."""
    value = record.get(key)
    if value is None:
        raise DataError(f"{where}: has no {key!r}, only {', '.join(record)}: name the right field with data.answer_key")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {key!r} must be text or a number, found {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: {key!r} is {value}: give a finite number or text")
    return str(value)


def _check_messages(value: Any, key: str, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {key!r} must be text or a list of messages, found {_name(value)}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"{where}: {key}[{i}] must be an object with role and content, found {_name(message)}")
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                raise DataError(f"{where}: {key}[{i}].{part} must be text, found {_name(message.get(part))}")
        messages.append({k: v for k, v in message.items() if v is not None})  # parquet writes absent keys as null
    if not any(m["content"].strip() for m in messages):
        raise DataError(f"{where}: {key!r} is empty")
    return messages


def _fits(ids: tuple[int, ...], where: str, cfg: DataConfig) -> bool:
    """False where the prompt is to be left out."""
    if not ids:
        raise DataError(f"{where}: the prompt has no tokens")
    if len(ids) <= cfg.max_prompt_tokens:
        return True
    if cfg.overlong == "drop":
        return False
    raise DataError(
        f"{where}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens={cfg.max_prompt_tokens}: "
        "raise it, or leave such prompts out with data.overlong=drop"
    )


def _name(value: Any) -> str:
    if value is None:
        return "nothing"
    return "an empty list" if value == [] else type(value).__name__


def _canonical(prompt: Prompt) -> bytes:
    content = [prompt.index, prompt.input_ids, prompt.answer, prompt.fields]
    return json.dumps(content, sort_keys=True, default=str).encode()
