"""Rollout servers as child processes: the command line, a free port, logs, and an end that comes with the owner's.

The fleet uses it. A server must not outlive the run that started it, not even after kill -9: each child holds the
reading end of a pipe whose writing end only the owner has. The embedded server itself exits at end of file; any other
command runs under `guard` (`python -m megasapo.rollout.spawn -- COMMAND`), which then ends the whole process group.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from megasapo import keys
from megasapo.launch import PR_SET_PDEATHSIG
from megasapo.sections import RolloutConfig

LOOPBACK = "127.0.0.1"
TERM_GRACE_S = 10.0
SGLANG_WITH_KEY = Path(__file__).with_name("sglang_with_key.py")  # run by its path: SGLang's python has no megasapo
# What SGLang (0.5.21) never removes: where it publishes its load, 16 KB for each start, and a semaphore
LEFT_BEHIND = ("sglang_loads_*.shm", "sem.mp-*")
SHARED_MEMORY = Path("/dev/shm")
LOOK_EVERY_S = 1.0
ROUTING_FLAG = "--enable-return-routed-experts"  # SGLang's, and the embedded server's
# What a launcher sets for the learner's ranks; a server that read it would take itself for one of them.
_RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"}
_RANK_VARIABLES |= {"GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def server_command(
    cfg: RolloutConfig, model: str | Path, port: int, *, host: str = LOOPBACK, python: str = sys.executable
) -> list[str]:
    """The command line of one server, `rollout.server_args` last; rollout.api_key_file must name its key.

    `host`: the address it listens on. `python`: of SGLang's environment.
    """
    key, limit_s = cfg.api_key_file, cfg.health_timeout_s
    assert key is not None
    sglang_limit = ("env", f"SGLANG_HEALTH_CHECK_TIMEOUT={math.ceil(limit_s)}")  # SGLang's own is 20 s
    if cfg.engine == "embedded":
        command = [sys.executable, "-m", "megasapo.rollout.local", "--model", str(model), "--port", str(port)]
        command += ["--host", host] if host != LOOPBACK else []
        command += ["--deterministic"] if cfg.repeatable else []
        command += ["--api-key-file", key, "--health-timeout-s", f"{limit_s:g}"]
    elif cfg.spawn_command:
        filled = {"model": model, "port": port, "host": host, "api_key_file": key}
        command = [*sglang_limit, *(_fill(part, filled) for part in cfg.spawn_command)]
    else:
        command = [*sglang_limit, python, str(SGLANG_WITH_KEY), key, "--model-path", str(model)]
        command += ["--host", host, "--port", str(port)]
    return [*command, *cfg.server_args]


def _fill(text: str, values: Mapping[str, object]) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def with_routing(cfg: RolloutConfig) -> RolloutConfig:
    """The same settings for servers that can return the experts they chose."""
    if ROUTING_FLAG in (*cfg.spawn_command, *cfg.server_args):
        return cfg
    return cfg.model_copy(update={"server_args": (*cfg.server_args, ROUTING_FLAG)})


class ServerProcess:
    """One child, its log file appended to over restarts."""

    def __init__(self, command: Sequence[str], log_file: Path, *, exits_with_stdin: bool) -> None:
        guarded = [sys.executable, "-m", __name__, "--", *command]
        self.command = [*command, "--exit-with-parent"] if exits_with_stdin else guarded
        self._grace_s = TERM_GRACE_S if exits_with_stdin else TERM_GRACE_S + 5  # the guard has its own grace to give
        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        environment = {  # keys in it are those of other servers
            k: v for k, v in keys.keyless().items() if k not in _RANK_VARIABLES and not k.startswith("TORCHELASTIC_")
        }
        with log_file.open("ab") as log:
            self._log_begins = log.tell()  # after what those before it wrote
            log.write(f"--- {time.strftime('%F %T')} {' '.join(command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches the learner, which stops the servers after its last step
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> str | None:
        """How it ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        number = -code if code < 0 else code - 128  # the guard passes on the shell's code for a signal
        return f"was killed by signal {number}" if 0 < number <= signal.SIGRTMAX else f"ended with code {code}"

    def log_tail(self) -> str:
        """Its last 20 lines."""
        with self.log_file.open("rb") as f:
            f.seek(max(self._log_begins, f.seek(0, os.SEEK_END) - 20_000))
            return "\n".join(f.read().decode(errors="replace").splitlines()[-20:])

    def stop(self) -> None:
        """End the process group: SIGTERM, and SIGKILL to what is left after the grace."""
        end_group(self._process, self._grace_s)
        if self._process.stdin is not None:
            with suppress(OSError):  # the reader is gone, which is what closing is for
                self._process.stdin.close()


def end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM to the group that `process` leads, SIGKILL to what is left after `grace_s`; reaps it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with suppress(ProcessLookupError):  # the leader may be gone and its children not
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def guard(command: list[str]) -> int:
    """Run `command` in a process group of its own until it ends, SIGTERM comes, or stdin (the owner) closes."""
    with_us = None
    if sys.platform.startswith("linux"):
        with_us = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL)  # `pkill -9 -f megasapo` hits us
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=with_us)
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())

    def owner_gone() -> None:
        while os.read(0, 4096):
            pass
        over.set()

    threading.Thread(target=owner_gone, daemon=True).start()
    mapped: set[Path] = set()
    look_at = 0.0
    while child.poll() is None and not over.wait(0.2):
        if time.monotonic() > look_at:  # and not only at the end: of a server that crashed nobody is left to ask
            mapped |= _mapped(child.pid)
            look_at = time.monotonic() + LOOK_EVERY_S
    mapped |= _mapped(child.pid)
    # also after the child ended by itself: its own children (schedulers) may be left
    end_group(child, TERM_GRACE_S)
    for file in mapped:
        file.unlink(missing_ok=True)
    return child.returncode


def _mapped(group: int) -> set[Path]:
    """What processes of this group have mapped of the files, of random names, that SGLang leaves behind."""
    numbers = set()  # a semaphore had another name when it was mapped
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            if os.getpgid(int(process.name)) == group:
                numbers |= set(re.findall(rf"(\d+) +{SHARED_MEMORY}/", (process / "maps").read_text()))
    found = set()
    for file in (file for pattern in LEFT_BEHIND for file in SHARED_MEMORY.glob(pattern)):
        with suppress(FileNotFoundError):
            if str(file.stat().st_ino) in numbers:
                found.add(file)
    return found


if __name__ == "__main__":
    code = guard(sys.argv[sys.argv.index("--") + 1 :])
    # a child that a signal ended: the shell's convention
    raise SystemExit(code if code >= 0 else 128 - code)
