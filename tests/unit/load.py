"""Starts processes of load_server.py, and says what the answers to a load must be."""

from __future__ import annotations

import heapq
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megasapo.types import Completion, SamplingParams

PROGRAM = str(Path(__file__).with_name("load_server.py"))
PROMPT_TOKENS = 100


class Servers:
    """One process that serves some ports."""

    def __init__(self, *flags: str, ports: int = 1, again_at: Sequence[int] = ()) -> None:
        where = [f"--port={p}" for p in again_at] or [f"--ports={ports}"]
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, *where, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait(self) -> Servers:
        """Until it listens."""
        assert self.process.stdout is not None
        self.ports: list[int] = json.loads(self.process.stdout.readline())
        self.urls = [f"http://127.0.0.1:{p}" for p in self.ports]
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def serving(*groups: Servers) -> Iterator[list[str]]:
    """The URLs of all, until the end of the block."""
    try:
        yield [url for group in groups for url in group.wait().urls]
    finally:
        for group in groups:
            group.kill()


def model(directory: Path) -> Path:
    """A config.json that admits every load."""
    config = {"vocab_size": 100_000, "max_position_embeddings": 8192, "num_hidden_layers": 1}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def requests(
    number: int, shortest: int, longest: int, group: int = 1
) -> tuple[list[tuple[int, ...]], list[SamplingParams]]:
    """Groups of requests with one prompt, whose first token says which; the lengths of responses are random."""
    lengths = random.Random(0).choices(range(shortest, longest + 1), k=number)
    prompts = [(i // group, *range(1, PROMPT_TOKENS)) for i in range(number)]
    return prompts, [SamplingParams(max_new_tokens=n) for n in lengths]


def check(completions: list[Completion], prompts: list[tuple[int, ...]], sampling: list[SamplingParams]) -> None:
    """Each request has its own answer, whole: none is lost, doubled, or another's."""
    assert len(completions) == len(prompts)
    for completion, prompt, s in zip(completions, prompts, sampling, strict=True):
        assert completion.output_ids == (prompt[0], *((7919 * i) % 90_000 for i in range(1, s.max_new_tokens)))
        assert completion.version_min == completion.version_max == 7


def ideal_s(sampling: Sequence[SamplingParams], in_flight: int, tokens_per_s: float) -> float:
    """What a client that takes no time would need: the requests in order, as many at once as may be."""
    ends = [0.0] * in_flight
    for s in sampling:
        heapq.heapreplace(ends, ends[0] + s.max_new_tokens / tokens_per_s)
    return max(ends)
