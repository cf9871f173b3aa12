"""The sizes of a model, read from an HF config.json.

layout.py checks sizes against a parallel layout, plan/ estimates memory and time from them, the learner derives its
model FLOPs. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megasapo.config import ConfigError
from megasapo.families import family
from megasapo.families.sizes import BACKWARD, Fields, Geometry, Latent, Parameters

__all__ = ["BACKWARD", "Geometry", "Latent", "Parameters", "geometry", "read_config", "read_geometry"]


def read_config(directory: str | Path, setting: str = "") -> dict[str, Any]:
    """An HF directory's config.json. Raises ConfigError, naming the setting, when there is none or it is damaged."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{setting}{directory}: no config.json there; give the directory of an HF model")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected an object, found {type(config).__name__}")
    return config


def read_geometry(model_path: str | Path) -> Geometry:
    """The sizes in an HF directory's config.json. Raises ConfigError when there is none or it cannot be used."""
    return geometry(read_config(model_path, "model.path="), source=str(Path(model_path) / "config.json"))


def geometry(config: Mapping[str, Any], source: str = "config.json") -> Geometry:
    """The sizes in the parsed config.json of a supported family (exact `model_type`); ConfigError otherwise."""
    return family(config.get("model_type"), source).geometry(Fields(config, source))
