"""The configuration of a run (sections.py has every setting), loaded from YAML plus dotted overrides.

`load(path, overrides)` is the only entrance. It refuses unknown keys (naming the nearest), wrong types and settings
that contradict one another, each with the value and what to change. It must not import torch.
"""

from __future__ import annotations

import copy
import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from megasapo import contradictions, sections
from megasapo.errors import ConfigError as ConfigError
from megasapo.overrides import apply_override, numbers, yaml_mistake
from megasapo.placed import placed
from megasapo.sections import Section


class Config(Section):
    run: sections.RunConfig = sections.RunConfig()
    model: sections.ModelConfig
    precision: sections.PrecisionConfig = sections.PrecisionConfig()
    data: sections.DataConfig = sections.DataConfig()
    reward: sections.RewardConfig = sections.RewardConfig()
    rollout: sections.RolloutConfig = sections.RolloutConfig()
    algo: sections.AlgoConfig = sections.AlgoConfig()
    parallel: sections.ParallelConfig = sections.ParallelConfig()
    optim: sections.OptimConfig = sections.OptimConfig()
    train: sections.TrainConfig = sections.TrainConfig()
    sft: sections.SftConfig = sections.SftConfig()
    eval: sections.EvalConfig = sections.EvalConfig()
    log: sections.LogConfig = sections.LogConfig()
    routing: sections.RoutingConfig = sections.RoutingConfig()
    stability: sections.StabilityConfig = sections.StabilityConfig()

    @property
    def asks_for_routing(self) -> bool:
        """Whether rollout servers must be able to return the experts that they chose."""
        return self.algo.routing_replay == "R3" or self.routing.uses_rollout_routing

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @model_validator(mode="after")
    def _no_contradictions(self) -> Config:
        contradictions.refuse(self)
        return self


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in a YAML file with `a.b=value` overrides (values are YAML). Raises ConfigError."""
    return from_dict(read(Path(path)), overrides, source=str(path))


def read(path: Path) -> dict[str, Any]:
    """The sections in a YAML file, unchecked. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce) or {}
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {yaml_mistake(e)}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    return raw


class _EachKeyOnce(yaml.SafeLoader):
    """Of two sections of one name YAML's loader would silently take the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1} - {"<<"}:
            raise yaml.MarkedYAMLError(problem=f"{', '.join(twice)} stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def from_dict(raw: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), source: str = "config") -> Config:
    """The same from a plain dictionary, which is not changed."""
    raw = copy.deepcopy(raw)
    for item in overrides:
        apply_override(raw, item)
    try:
        return Config.model_validate(numbers(raw))
    except ValidationError as e:
        broken = {err["loc"][:n] for err in e.errors() for n in range(len(err["loc"]))}
        # a list with an item that is wrong counts as too short, too
        said = (err for err in e.errors() if err["type"] != "too_short" or err["loc"] not in broken)
        raise ConfigError("\n".join(_explain(source, err) for err in said)) from None


def save(cfg: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load` reads back to an equal one."""
    with placed(path) as unfinished:
        unfinished.write_text(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What changed between two resolved configurations, one line a setting."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


# pydantic speaks of Python's types, a user writes YAML
SHAPES = {
    "tuple_type": "give a list: [VALUE, ...]",
    "dict_type": "give a mapping: {NAME: VALUE, ...}",
    "model_type": "give a mapping: {NAME: VALUE, ...}",
}


def _explain(source: str, err: Any) -> str:
    where = ".".join(str(p) for p in err["loc"])
    if err["type"] == "extra_forbidden":
        return f"{source}: unknown key {where!r}{_nearest(err['loc'])}"
    if err["type"] == "missing":
        return f"{source}: {where} is required"
    if err["type"] == "model_type" and isinstance(err["loc"][-1], str):
        return f"{source}: {where}={err['input']!r}: a section: write {where}.NAME=VALUE, or a mapping in the file"
    message = SHAPES.get(err["type"], err["msg"].removeprefix("Value error, "))
    if not where:
        return f"{source}: {message}"
    return f"{source}: {where}={err['input']!r}: {message}"


def _nearest(loc: tuple[Any, ...]) -> str:
    section: type[Section] | None = Config
    for name in (part for part in loc[:-1] if isinstance(part, str)):  # others are places in lists
        field = section.model_fields.get(name) if section else None
        section = _section(field.annotation) if field else None
    if section is None:
        return ""
    names = list(section.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*map(str, loc[:-1]), close[0]])!r}?"
    every: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    elsewhere = [f"{name}.{loc[-1]}" for name, section in every.items() if loc[-1] in section.model_fields]
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known keys: {', '.join(names)}"


def _section(annotation: Any) -> type[Section] | None:
    """The section that a setting holds: itself, as items of a list, or if anything."""
    if parts := typing.get_args(annotation):
        return next(filter(None, map(_section, parts)), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
