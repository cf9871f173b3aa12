"""The model families that megasapo knows, each by its exact HF `model_type`: one module with all that is its own.

`family` is the entrance. family.py says what a family is, weights.py and sizes.py have the vocabulary, decoder.py what
several share. No torch, transformers or megatron in here: geometry.py and `--help` import it.
"""

from __future__ import annotations

import difflib

from megasapo.config import ConfigError
from megasapo.families import deepseek_v3, glm4_moe, gpt_oss, mixtral, qwen2_moe, qwen3, qwen3_moe
from megasapo.families.family import Family

FAMILIES: dict[str, Family] = {
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "mixtral": mixtral.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
}


def family(model_type: object, source: str = "config.json") -> Family:
    """The family of an HF model_type, read from `source`. ConfigError names the nearest and all that are supported."""
    found = FAMILIES.get(str(model_type))
    if found is None:
        close = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.75)
        hint = f" (the nearest is {close[0]!r})" if close else ""
        known = ", ".join(FAMILIES)
        raise ConfigError(f"{source}: model_type={model_type!r} is not supported{hint}; supported: {known}")
    return found
