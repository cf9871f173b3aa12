"""Demonstrations for the supervised cold start: prompt and response as one token sequence with its loss mask.

Called by megasapo.sft. The prompt is tokenised exactly as prompts.py does for rollouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megasapo.data.files import DataError, batched, read_records
from megasapo.data.prompts import Rendered, render_prompt, tokenise
from megasapo.sections import DataConfig, SftConfig
from megasapo.types import TrainSequence


def load_demonstrations(path: str | Path, tokenizer: Any, data: DataConfig, sft: SftConfig) -> list[TrainSequence]:
    """The file's examples in file order, uid counting from 0, advantage 1, rollout_logp 0.

    A record has a prompt (or messages) and a response; or messages whose last one is the assistant's. Trained on are
    the response's tokens and the end-of-sequence token after them. Raises DataError with file and line.
    """
    path = Path(path)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {tokenizer.name_or_path!r} has no end-of-sequence token to end responses with"
        )
    examples: list[TrainSequence] = []
    for rows in batched(read_records(path)):
        examples += _examples(path, rows, len(examples), tokenizer, data, sft)
    if not examples:
        raise DataError(f"{path}: no examples in it")
    return examples


def _examples(
    path: Path, rows: list[tuple[int, dict[str, Any]]], first_uid: int, tokenizer: Any, data: DataConfig, sft: SftConfig
) -> list[TrainSequence]:
    prompts, responses = [], []
    for line, record in rows:
        record, response = _split_response(record, f"{path}:{line}", data, sft)
        prompts.append(render_prompt(record, f"{path}:{line}", tokenizer, data))
        responses.append(Rendered(response, is_plain=False))
    ids = zip(tokenise(tokenizer, prompts), tokenise(tokenizer, responses))
    return [
        _example(first_uid + i, prompt, (*response, tokenizer.eos_token_id), f"{path}:{rows[i][0]}", sft)
        for i, (prompt, response) in enumerate(ids)
    ]


def _example(uid: int, prompt: tuple[int, ...], response: tuple[int, ...], where: str, sft: SftConfig) -> TrainSequence:
    num_tokens = len(prompt) + len(response)
    if num_tokens > sft.max_tokens:
        raise DataError(
            f"{where}: prompt and response have {num_tokens} tokens, more than sft.max_tokens={sft.max_tokens}: "
            "raise it or shorten the example"
        )
    loss_mask = np.zeros(num_tokens, dtype=bool)
    loss_mask[len(prompt) :] = True
    return TrainSequence(
        uid=uid,
        tokens=np.asarray(prompt + response, dtype=np.int32),
        loss_mask=loss_mask,
        rollout_logp=np.zeros(num_tokens, dtype=np.float32),
        advantage=1.0,
    )


def _split_response(record: dict[str, Any], where: str, data: DataConfig, sft: SftConfig) -> tuple[dict[str, Any], str]:
    """The record without its response, and the response."""
    response = record.get(sft.response_key)
    messages = record.get(data.messages_key)
    last = messages[-1] if isinstance(messages, list) and messages else None
    if response is None and isinstance(last, dict) and last.get("role") == "assistant":
        record, response = {data.messages_key: messages[:-1]}, last.get("content")  # type: ignore[index]
    if response is None:
        raise DataError(
            f"{where}: has no {sft.response_key!r}, only {', '.join(record)}: name the right field with "
            "sft.response_key, or end the messages with the assistant's"
        )
    if not isinstance(response, str) or not response:
        found = "an empty one" if response == "" else type(response).__name__
        raise DataError(f"{where}: the response must be text, found {found}")
    return record, response
