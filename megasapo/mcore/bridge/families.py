"""Which weight table belongs to which HF model_type, by exact name. Used by placement.py."""

from __future__ import annotations

import difflib

from megasapo.mcore.bridge import qwen3, qwen3_moe
from megasapo.mcore.bridge.table import BridgeError, Family

FAMILIES: dict[str, Family] = {
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}


def family(model_type: str) -> Family:
    """The table of an HF model_type. Raises BridgeError, which names the nearest and all known ones."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    close = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f"the nearest is {close[0]!r}; " if close else ""
    raise BridgeError(f"model_type {model_type!r} has no weight table: {hint}known: {known}")
