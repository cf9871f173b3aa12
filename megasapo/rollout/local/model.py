"""Loads a model and tokenizer from an HF directory, ready for the engine. Called once, by the server at start."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megasapo.data.tokenizer import has_tokenizer, read_tokenizer
from megasapo.errors import UserError
from megasapo.rollout.local import quantised
from megasapo.rollout.local.options import Options
from megasapo.rollout.local.weights import Weights


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the rest of the server needs to know of a model."""

    model: PreTrainedModel
    tokenizer: Any | None
    vocab_size: int
    context_length: int
    eos_ids: frozenset[int]
    weights: Weights | None = None  # of a quantised model

    def text_decoder(self) -> Callable[[list[int]], str] | None:
        """Token ids to text, special tokens kept; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        own = copy.deepcopy(self.tokenizer)  # for the engine's thread: a tokenizer must not be used from two at once
        return lambda ids: own.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def load(options: Options) -> Loaded:
    """The model in eval mode on its device, every weight in memory of its own."""
    path = options.model
    transformers.utils.logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    text = config.get_text_config()
    limit = text.max_position_embeddings
    context = options.context_length or limit
    if context > limit:
        raise UserError(f"--context-length {context} exceeds the model's max_position_embeddings={limit}")
    dtype: Any = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    weights = None
    if getattr(config, "quantization_config", None) is not None:
        model, weights = quantised.load(path, config, dtype, options.device)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, local_files_only=True)
        model.to(options.device).eval().requires_grad_(False)  # type: ignore[arg-type]  # mypy loses `self` here
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()  # loading may have mapped the file, which updates overwrite
    tokenizer = read_tokenizer(path) if has_tokenizer(path) else None
    eos = _ids(text.eos_token_id) | _ids(getattr(model.generation_config, "eos_token_id", None))
    if tokenizer is not None:
        eos |= _ids(tokenizer.eos_token_id)
    return Loaded(
        model,
        tokenizer,
        text.vocab_size,
        context,
        frozenset(t for t in eos if 0 <= t < text.vocab_size),  # others can never be sampled
        weights,
    )


def _ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)
