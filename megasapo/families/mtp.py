"""Layers for multi-token prediction (MTP), which released files have after the model's own, for speculative decoding.

They are neither loaded nor trained, but carried from files to files as they are. Called by the bridge and by convert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megasapo.families import family

COUNT = "num_nextn_predict_layers"
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def mtp_layers(config: Mapping[str, Any]) -> range:
    """The indices that they have in the files of a model, by its config.json; none in most families."""
    count = int(config.get(COUNT) or 0) if family(config["model_type"]).weights.mtp_layers else 0
    return range(config["num_hidden_layers"], config["num_hidden_layers"] + count) if count else range(0)


def is_mtp(layers: range, name: str) -> bool:
    """Whether an HF name is of one of these layers."""
    found = LAYER.match(name)
    return found is not None and int(found[1]) in layers


def mtp_names(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of `names` that belong to these layers."""
    layers = mtp_layers(config)
    return [name for name in names if is_mtp(layers, name)]


def exported_config(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """config.json of an export with these tensors: it has as many such layers as are among them."""
    layers = mtp_layers(config)
    found = {match[1] for name in names if is_mtp(layers, name) and (match := LAYER.match(name))}
    return dict(config) if len(found) == len(layers) else {**config, COUNT: len(found)}
