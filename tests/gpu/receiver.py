"""A process that takes tensors as SGLang does, by torch's own functions; and its other side, which sends them."""

from __future__ import annotations

import base64
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing import reductions

from megasapo.rollout.shared_memory import managed
from tests.dist.launcher import ROOT


class Receiver:
    """The sender's end. `take` returns the sum of each tensor, which the other side still holds then."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def take(self, payload: str) -> dict[str, float]:
        return self._ask(payload)

    def sums(self) -> dict[str, float]:
        """Of what it holds, once more."""
        return self._ask("")

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the receiver ended with code {self._process.wait(30)}"
        return json.loads(answer)


@contextmanager
def receiving() -> Iterator[Receiver]:
    """One other process; it must end well."""
    command = [sys.executable, "-m", "tests.gpu.receiver"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Receiver(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def _rebuild_by_uuid(*arguments: Any) -> Any:
    """As sglang.srt.utils.patch_torch: the seventh argument names a device by its UUID."""
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return rebuild_cuda_tensor(*arguments[:6], uuids.index(arguments[6]), *arguments[7:])


if __name__ == "__main__":
    rebuild_cuda_tensor = reductions.rebuild_cuda_tensor
    reductions.rebuild_cuda_tensor = _rebuild_by_uuid
    held: list[tuple[str, torch.Tensor]] = []
    for line in sys.stdin:
        if line.strip():
            held.clear()
            payload = base64.b64decode(line)
            held = managed(lambda payload=payload: pickle.loads(payload))
        print(json.dumps({name: float(tensor.double().sum()) for name, tensor in held}), flush=True)
    held.clear()  # while CUDA is still there to say so to the sender
