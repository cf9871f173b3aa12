"""The `megasapo` command itself, beside what its subcommands do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("words", [[], ["stale"]], ids=["much", "little"])  # printed before the end, and at it
def test_a_reader_that_leaves_ends_it_without_a_traceback(words: list[str]) -> None:
    command = [sys.executable, "-m", "megasapo.cli", "settings", *words]
    read, write = os.pipe()
    os.close(read)  # before it starts: a pipe takes all of this, if somebody is there
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_of_something_else_is_shown() -> None:
    code = (
        "import sys\n"
        "from megasapo import cli, settings\n"
        "def main(argv): raise BrokenPipeError('of a server')\n"
        "settings.main = main\n"
        "sys.exit(cli.main(['settings']))"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "BrokenPipeError: of a server" in failed.stderr


@pytest.mark.parametrize("words", [[], ["stale"]], ids=["much", "little"])
def test_output_to_a_full_disk_is_one_line(words: list[str]) -> None:
    command = [sys.executable, "-m", "megasapo.cli", "settings", *words]
    with Path("/dev/full").open("w") as full:
        failed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert failed.returncode == 2
    said = "megasapo settings: its output cannot be written: No space left on device; send it elsewhere\n"
    assert failed.stderr == said
