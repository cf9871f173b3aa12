"""Loads a tokenizer from a local HF directory and says what is wrong when it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasapo.config import ConfigError


def load_tokenizer(path: str | Path) -> Any:
    """The transformers tokenizer of an HF directory. Raises ConfigError when there is none; never asks a hub."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path={path}: no config.json there; give a local HF directory")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.path={path}: its tokenizer does not load: {e}") from e
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path={path}: its tokenizer names no eos_token; responses could not end")
    return tokenizer
