"""`python sglang_with_key.py KEY_FILE [flags]`: sglang.launch_server with the API key that a file holds.

SGLang takes its key as a flag only, which every user of the machine could read, and writes all its flags into its log.
Run by its path in SGLang's own environment: it must import nothing of megasapo, and nothing at all but by need.
"""

import logging
import runpy
import sys
from pathlib import Path
from typing import Any


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
    key_file = Path(sys.argv[1])
    key = key_file.read_text().strip()
    if len(key) < 8 or len(key.split()) != 1:
        sys.exit(f"{key_file}: expected one key of at least 8 characters, without spaces")
    sys.path.pop(0)  # this file's directory, whose modules are not SGLang's
    hide(key)
    sys.argv = ["sglang.launch_server", *sys.argv[2:], "--api-key", key]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
