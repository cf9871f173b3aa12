"""What a family is: how its config.json is read, and its weights.

A module of this package describes one family by a `FAMILY`; geometry.py, mcore/model.py and the bridge read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megasapo.config import ConfigError
from megasapo.families.sizes import Fields, Geometry
from megasapo.families.weights import WeightTable


class Rotary(NamedTuple):
    """Rotary position embedding: the first `dim` values of each query and key head, in halves, turn with base theta."""

    theta: float
    dim: int
    scaled: Callable[[Any], tuple[Any, float]] | None = None
    """Where theta does not say it all: on a device, radians a position of each pair, and by how much cosines and sines
    are multiplied."""
    yarn: dict[str, Any] | None = None
    """What megatron-core's own YaRN reads of its configuration, where that is how they are scaled."""


def head_dim(hf: Any) -> int:
    """Of a transformers configuration; where it says nothing, heads share the hidden size."""
    size = getattr(hf, "head_dim", None)
    return int(size if size is not None else hf.hidden_size // hf.num_attention_heads)


def rotary(hf: Any) -> Rotary:
    """Of a transformers configuration; ConfigError for angles that are scaled."""
    rope = hf.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_type={rope['rope_type']!r} is not supported; only 'default' is")
    return Rotary(float(rope["rope_theta"]), int(head_dim(hf) * rope.get("partial_rotary_factor", 1.0)))


@dataclass(frozen=True, slots=True)
class Family:
    """All that the program needs to know of one HF model_type."""

    geometry: Callable[[Fields], Geometry]
    """Sizes from the fields of config.json."""
    transformer_fields: Callable[[Any, Geometry], dict[str, Any]]
    """From a transformers configuration and its sizes, the fields of megatron-core's TransformerConfig; ConfigError for
    a setting that the learner would not compute as transformers does."""
    weights: WeightTable
    rotary: Callable[[Any], Rotary] = rotary
