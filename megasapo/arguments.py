"""The commands' argument parser: a mistake is one line that says what is wrong, as every other mistake is."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's without abbreviations (a misspelt flag is no flag) and without the whole usage before an error."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def add_config(self) -> None:
        """CONFIG.yaml, and settings over it: to be parsed with parse_intermixed_args, as flags may stand between."""
        self.add_argument("config", metavar="CONFIG.yaml")
        self.add_argument(
            "overrides", nargs="*", default=[], metavar="a.b=c", help="settings over the file's, values as YAML"
        )

    def error(self, message: str) -> NoReturn:
        """Print it and exit with code 2."""
        unknown, flags = message.partition("unrecognized arguments: ")[2].split(), list(self._option_string_actions)
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else f"`{self.prog} --help` has all arguments"
        self.exit(2, f"{self.prog}: {message}; {hint}\n")
