"""`megasapo settings`: every setting of a configuration with its default and meaning, as sections.py documents them."""

from __future__ import annotations

import json
import textwrap
from typing import Any, get_args

from megasapo.arguments import Parser
from megasapo.config import Config
from megasapo.errors import UserError


def main(argv: list[str]) -> int:
    """Print all settings, or those in which every word occurs. UserError: there is none."""
    parser = Parser(prog="megasapo settings", description="every setting, with its default and what it means")
    parser.add_argument("words", nargs="*", help="only settings with all of these words, such as rollout or stale")
    words = [word.lower() for word in parser.parse_args(argv).words]
    entries = [_entry(*pair) for pair in _settings() if all(word in "".join(_entry(*pair)).lower() for word in words)]
    if not entries:
        raise UserError(f"no setting has {' and '.join(words)} in its name or description")
    for head, text in entries:
        print(head, *textwrap.wrap(text, 112, initial_indent="    ", subsequent_indent="    "), sep="\n")
    return 0


def _settings() -> list[tuple[str, Any]]:
    sections: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    return [(f"{s}.{name}", field) for s, section in sections.items() for name, field in section.model_fields.items()]


def _entry(name: str, field: Any) -> tuple[str, str]:
    default = "  (required)" if field.is_required() else _written(field.get_default(call_default_factory=True))
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    either = f"  ({' | '.join(choices)})" if choices else ""
    return f"{name}={default}{either}", field.description or ""


def _written(value: Any) -> str:
    """As one would write it in YAML; what is empty by default is empty."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, default=lambda record: record.model_dump(mode="json", exclude_defaults=True))
