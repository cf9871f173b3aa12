"""API keys of rollout servers: out of a file or the environment, and never a command line, a log or a setting.

Read by clients, by the embedded server and by whatever starts servers. It must not import torch.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from megasapo.errors import ConfigError

VARIABLE, ADMIN_VARIABLE = "MEGASAPO_API_KEY", "MEGASAPO_ADMIN_API_KEY"


@dataclass(frozen=True, slots=True)
class Keys:
    """What a server asks for: `api` for everything, or `admin` for what changes its state and `api` for the rest."""

    api: str | None = field(default=None, repr=False)
    admin: str | None = field(default=None, repr=False)

    @property
    def control(self) -> str | None:
        return self.admin or self.api


def read(api_file: str | None = None, admin_file: str | None = None, *, environment: bool = True) -> Keys:
    """The keys in the files; one without a file is the environment's, if that may be asked. Raises ConfigError."""
    keys = Keys(_read(api_file, VARIABLE, environment), _read(admin_file, ADMIN_VARIABLE, environment))
    if keys.admin is not None and keys.admin == keys.api:
        raise ConfigError("the API key and the admin API key are the same: use two keys, or only the first")
    return keys


def keyless() -> dict[str, str]:
    """This process's environment without keys, for children that need none: servers, graders."""
    return {name: value for name, value in os.environ.items() if name not in (VARIABLE, ADMIN_VARIABLE)}


def _read(path: str | None, variable: str, environment: bool) -> str | None:
    if path is None and not (environment and os.environ.get(variable)):
        return None
    try:
        key = (os.environ[variable] if path is None else Path(path).read_text()).strip()
    except (OSError, ValueError) as e:
        raise ConfigError(f"the API key cannot be read: {e}") from e
    if not key or not key.isascii() or any(c.isspace() for c in key):
        raise ConfigError(f"{path or variable}: expected one key, ASCII, without spaces")
    return key


def make(path: Path) -> None:
    """A new key in a new file that only its owner can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(32))
