"""`python sglang_with_key.py KEY_FILE [flags]`: sglang.launch_server with the API key that a file holds.

KEY_FILE `-`: it is in MEGASAPO_API_KEY. An admin key is taken from MEGASAPO_ADMIN_API_KEY.

SGLang takes its key as a flag only, which every user of the machine could read, and writes all its flags into its log.
Run by its path in SGLang's own environment: it must import nothing of megasapo, and nothing at all but by need.
"""

import importlib.util
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import Any

VARIABLE, ADMIN_VARIABLE = "MEGASAPO_API_KEY", "MEGASAPO_ADMIN_API_KEY"  # as in megasapo/keys.py


def hide(secret: str) -> None:
    """Keep `secret` out of every log record of this process from now on."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        try:
            text = made.getMessage()
        except (TypeError, ValueError):
            return made  # arguments that do not fit: logging itself will say so
        if secret in text:
            made.msg, made.args = text.replace(secret, "***"), ()
        return made

    logging.setLogRecordFactory(record)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    named = sys.argv[1]
    try:
        keys = {"--api-key": os.environ.get(VARIABLE, "") if named == "-" else Path(named).read_text()}
    except (OSError, ValueError) as e:
        sys.exit(f"the API key cannot be read: {e}; `-` as first argument takes that in {VARIABLE}")
    keys |= {"--admin-api-key": os.environ[ADMIN_VARIABLE]} if os.environ.get(ADMIN_VARIABLE) else {}
    flags = []
    for flag, text in keys.items():
        key = text.strip()
        if len(key) < 8 or len(key.split()) != 1:
            sys.exit(f"{flag}, from {named}: expected one key of at least 8 characters, without spaces")
        hide(key)
        flags.append(f"{flag}={key}")  # one word, for a key may begin with -
    sys.path.pop(0)  # this file's directory, whose modules are not SGLang's
    if importlib.util.find_spec("sglang") is None:
        sys.exit(f"{sys.executable} has no SGLang: name the python that has (rollout.spawn_command, SERVER_PYTHON)")
    sys.argv = ["sglang.launch_server", *sys.argv[2:], *flags]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
