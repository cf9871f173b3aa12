"""Loads a tokenizer from a local HF directory and says what is wrong when it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasapo.config import ConfigError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of which makes one


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of an HF directory that a run learns from. Raises ConfigError when there is none."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.path={path}: no config.json there; give a local HF directory")
    if not has_tokenizer(path):  # of some, transformers would make one that knows no text
        raise ConfigError(
            f"model.path={path}: no tokenizer there ({', '.join(FILES)}); copy that of the model which it was made from"
        )
    tokenizer = read_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.path={path}: its tokenizer names no eos_token; responses could not end")
    return tokenizer


def has_tokenizer(path: str | Path) -> bool:
    return any((Path(path) / name).exists() for name in FILES)


def read_tokenizer(path: str | Path) -> Any:
    """The transformers tokenizer in an HF directory. Raises ConfigError for a broken one; never asks a hub."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as e:  # of three libraries' own kinds
        raise ConfigError(f"{path}: its tokenizer does not load: {type(e).__name__}: {' '.join(str(e).split())}") from e
