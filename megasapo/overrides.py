"""Settings given on the command line and the numbers in YAML files, before config.py looks at them."""

from __future__ import annotations

import math
from typing import Any

import yaml

from megasapo.errors import ConfigError


def apply_override(raw: dict[str, Any], item: str) -> None:
    """Put `section.key=value`, the value in YAML, into `raw`. Raises ConfigError."""
    key, sep, value = item.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {item!r}: expected section.key=value")
    *sections, last = key.split(".")
    node = raw
    for name in sections:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {item!r}: {name} is not a section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {item!r}: the value is not valid YAML: {yaml_mistake(e)}") from e


def yaml_mistake(error: yaml.YAMLError | ValueError) -> str:
    """What is wrong and where, in one line; PyYAML takes up to eight."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return " ".join(str(error).split())
    where = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    began = f", from line {error.context_mark.line + 1}" if error.context_mark else ""
    return f"{where}: {error.problem}{f' {error.context}{began}' if error.context else ''}"


def numbers(node: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean a number."""
    if isinstance(node, dict):
        return {k: numbers(v) for k, v in node.items()}
    if isinstance(node, list):
        return [numbers(v) for v in node]
    if isinstance(node, str) and node[:1] in "+-.0123456789" and "e" in node.lower():
        try:
            number = float(node)
        except ValueError:
            return node
        return number if math.isfinite(number) else node
    return node
