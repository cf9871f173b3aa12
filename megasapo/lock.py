"""One run directory, one job: rank 0 holds RUN/lock from before anything is written there until it has ended.

Called by train.py, sft.py and, before ranks are started, by run.py. The lock is flock's: the kernel drops it with the
process, however that ends. File systems of clusters may not pass it on to other machines: there the signs of life of
the job that the file names decide (log/heartbeat.py). A requeued Slurm job waits until its earlier attempt is gone: to
be refused would cost it one of the attempts that it has.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import psutil

from megasapo.errors import ConfigError, UserError
from megasapo.launch import Place
from megasapo.log.heartbeat import LONGEST_S

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFS without a lock daemon
CLOCK_S = 5  # by which a machine may correct its clock, and with it when a process began
PATIENCE_S = 3 * LONGEST_S  # a process that lives has written a sign of life by then
UNKNOWN = {"host": "", "pid": 0, "since": 0.0, "job": "", "attempt": 0}
DYING_S = 300  # that Slurm and a file system may take to be rid of a job's earlier attempt


class InUse(UserError, RuntimeError):
    """Another job works in the run directory."""


@contextmanager
def hold(run_dir: Path, place: Place, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Inside, the run directory is this job's; rank 0 holds it for all. Raises InUse when it is another's."""
    if place.rank != 0:
        yield
        return
    with _open(run_dir) as file:
        works = _lock(file, run_dir, place)
        before = _owner(file)
        end = time.monotonic() + DYING_S
        while before is not None and _lives(before, run_dir, place, works, patience_s):
            _wait_for(before, run_dir, place, end)
        mine = {"host": place.host, "pid": os.getpid(), "since": _began(os.getpid()), "job": place.job}
        file.truncate(0)
        json.dump(mine | {"attempt": place.attempt}, file)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def refuse_held(run_dir: Path, place: Place) -> None:
    """Raises InUse if another process of a machine that shares locks with this one holds the directory.

    Raises ConfigError where nothing can be written.
    """
    with _open(run_dir) as file:
        _lock(file, run_dir, place)


def _open(run_dir: Path) -> TextIO:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return (run_dir / "lock").open("a+", errors="replace")
    except OSError as e:
        raise ConfigError(f"run.dir={run_dir.parent}, run.name={run_dir.name}: cannot write there: {e}") from e


def _lock(file: TextIO, run_dir: Path, place: Place) -> bool:
    """Take the lock until `file` is closed; False where the file system has none. Raises InUse."""
    end = time.monotonic() + DYING_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            _wait_for(_owner(file), run_dir, place, end)
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
            return False


def _wait_for(owner: dict[str, Any] | None, run_dir: Path, place: Place, end: float) -> None:
    """A while, for the end of an earlier attempt of this job. Raises InUse for any other owner, and after `end`."""
    ours = owner is not None and place.job and owner["job"] == place.job and owner["attempt"] < place.attempt
    if not ours or time.monotonic() > end:
        raise InUse(_message(run_dir, owner))
    print(f"{run_dir} is still held by an earlier attempt of job {place.job}: waiting for it to be gone", flush=True)
    time.sleep(DYING_S / 30)


def _lives(owner: dict[str, Any], run_dir: Path, place: Place, works: bool, patience_s: float) -> bool:
    """Whether the job that wrote `owner` is alive, though the lock could be taken or there is none."""
    if owner["host"] == place.host:
        began = None if works else _began(owner["pid"])
        return began is not None and abs(began - owner["since"]) < CLOCK_S
    sign = run_dir / "logs" / "ranks" / "rank_0.json"
    first = _read(sign)
    if first is None or _has_ended(first, sign):
        return False
    print(
        f"{run_dir} was last used on {owner['host'] or 'an unknown machine'}: looking for signs of life there for "
        f"{patience_s:.0f} s",
        flush=True,
    )
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        time.sleep(min(1.0, patience_s / 10))
        now = _read(sign)
        if now is not None and now != first:
            return True
    return False


def _has_ended(text: bytes, sign: Path) -> bool:
    """Whether a job's last sign of life says so; a damaged one says nothing, and whoever lives writes it anew."""
    try:
        return bool(json.loads(text)["state"] != "running")
    except (ValueError, TypeError, KeyError):
        print(f"{sign} is damaged, as after a loss of power: {text[:40]!r}", flush=True)
        return False


def _message(run_dir: Path, owner: dict[str, Any] | None) -> str:
    job = f", Slurm job {owner['job']}" if owner and owner["job"] else ""
    who = f"process {owner['pid']} on {owner['host']}{job}" if owner and owner["host"] else "another process"
    return (
        f"{run_dir} is in use by {who}: two jobs would destroy each other's files. Wait for it, stop it (touch "
        f"{run_dir / 'stop'}), or choose another run.name; if it is surely gone, remove {run_dir / 'lock'}"
    )


def _owner(file: TextIO) -> dict[str, Any] | None:
    """Who wrote into the lock file and has not ended; of a damaged one nobody knows."""
    file.seek(0)
    text = file.read()
    try:
        return UNKNOWN | json.loads(text) if text else None
    except (ValueError, TypeError):
        print(f"{file.name} is damaged, as after a kill or a loss of power: {text[:40]!r}", flush=True)
        return UNKNOWN


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _began(pid: int) -> float | None:
    """When a process of this machine began, which tells it from a later one of the same number."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
