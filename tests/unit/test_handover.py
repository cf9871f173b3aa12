"""Memory that is handed to another process: it takes what it was told of, and neither side's end disturbs the other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megasapo.rollout import shared_memory
from megasapo.rollout.handover import Shared
from megasapo.rollout.local import payload
from tests.gpu.receiver import receiving

CPU = torch.device("cpu")


def test_torch_in_another_process_takes_the_tensors() -> None:
    first = Shared([("a", torch.arange(6.0).view(2, 3)), ("b", torch.tensor(2.5))], CPU)
    with receiving() as one, receiving() as another:
        for receiver in (one, another):
            assert receiver.take(first.payload()) == {"a": 15.0, "b": 2.5}
        first.payload()  # of a server that never reads it
        file = first._file
        assert file is not None
        first.free()
        assert not file.exists()
        second = Shared([("c", torch.full((3,), 2.0, dtype=torch.bfloat16))], CPU)
        assert one.sums() == {"a": 15.0, "b": 2.5}  # it holds the memory still, and lets go of it now
        assert one.take(second.payload()) == {"c": 6.0}
        assert another.sums() == {"a": 15.0, "b": 2.5}
        second.free()


def test_a_manager_of_memory_that_gets_no_turn_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the learner when it allocates, and by the server when it gives back."""
    errors: list[str] = []

    def seldom(real: Any) -> Any:
        def call(*arguments: Any) -> torch.UntypedStorage:
            if errors:
                raise RuntimeError(errors.pop(0))
            return real(*arguments)

        return call

    for name in ("_new_using_filename_cpu", "_new_shared_filename_cpu"):
        monkeypatch.setattr(torch.UntypedStorage, name, seldom(getattr(torch.UntypedStorage, name)))
    late = "Shared memory manager connection has timed out"
    errors += [late] * 2
    shared = Shared([("a", torch.ones(4))], CPU)
    found = payload.parse(shared.payload())
    errors += [late] * 2
    [(_, received)] = payload.read(found)
    shared.free()
    assert received.tolist() == [1, 1, 1, 1]
    errors += [late, "no space"]
    with pytest.raises(RuntimeError, match="no space"):
        Shared([("a", torch.ones(4))], CPU)
    errors.append(late)
    monkeypatch.setattr(shared_memory, "MANAGER_S", -1.0)
    with pytest.raises(RuntimeError, match="has timed out"):
        Shared([("a", torch.ones(4))], CPU)


@pytest.mark.parametrize("directory", ["missing", "file", "long" * 25])
def test_a_temporary_directory_that_torch_cannot_use_is_refused_at_the_start(directory: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / ("long" * 25)).mkdir()
    code = (
        "import torch; from megasapo.errors import ConfigError; from megasapo.rollout.handover import Handover\n"
        "try: Handover(None, torch.device('cpu'))\n"
        "except ConfigError as e: print(e)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / directory), "TMP": "/tmp"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    why = f"torch cannot share memory, for which it makes a socket in {tmp_path / directory}: "
    assert done.stdout.startswith(f"rollout.publish=tensor: {why}")
    assert done.stdout.endswith(
        "; set TMPDIR to a directory that exists, can be written and has a short name, such as "
        "/tmp, or use publish=disk\n"
    )
    assert done.stdout.count("\n") == 1


def test_a_sender_that_is_killed_leaves_no_memory_behind() -> None:
    code = (
        "import os, signal, torch; from megasapo.rollout.handover import Shared\n"
        "shared = Shared([('a', torch.ones(4))], torch.device('cpu')); shared.payload()\n"
        "print(shared._file, shared._file.exists(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    file, existed = done.stdout.split()
    assert existed == "True"
    deadline = time.monotonic() + 300
    while Path(file).exists():  # torch's manager, a process of its own, sees that it is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
