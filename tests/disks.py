"""A file system that is soon full."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = os.sysconf("SC_PAGE_SIZE")  # what is taken of it comes in these


@contextmanager
def small_disk(where: Path) -> Iterator[Path]:
    """A file system of 32 MiB; needs the right to mount one."""
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def fill(disk: Path, free: int) -> Path:
    """Leave so many bytes of it, whole pages; the file that takes up the rest."""
    ballast = disk / "ballast"
    left = shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(left - free))
    assert shutil.disk_usage(disk).free == free
    return ballast
