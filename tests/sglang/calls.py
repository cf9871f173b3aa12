"""What the contract tests ask of a server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.torch import load_file

from megasapo.publish import Bucket, Publisher
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams
from tests.sglang.conftest import Contract
from tests.sglang.reference import greedy_of, logprobs_of

PROMPTS = [(5, 6, 7), (300, 41, 9, 17, 400, 401, 402), (64,)]
GREEDY = SamplingParams(max_new_tokens=16, temperature=0.0, ignore_eos=True)
LONG = {"max_new_tokens": 1500, "temperature": 0.0, "ignore_eos": True}  # seconds: short ones end before a call
TIMEOUT_S = 300.0  # of what hangs
T = TypeVar("T")


def generate(
    c: Contract,
    sampling: SamplingParams = GREEDY,
    routed: bool = False,
    prompts: list[tuple[int, ...]] = PROMPTS,
) -> list[Completion]:
    async def run() -> list[Completion]:
        try:
            return await c.fleet.generate(prompts, [sampling] * len(prompts), return_routed_experts=routed)
        finally:
            await c.fleet.close()

    return asyncio.run(run())


def assert_serves(c: Contract, directory: Path, version: int) -> None:
    for prompt, completion in zip(PROMPTS, generate(c), strict=True):
        assert completion.output_ids == greedy_of(directory, prompt)
        expected = logprobs_of(directory, prompt, completion.output_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)
        assert (completion.version_min, completion.version_max) == (version, version)


def publish(c: Contract, directory: Path, version: int, method: Any) -> None:
    def export() -> Iterator[Bucket]:
        tensors = list(load_file(directory / "model.safetensors").items())
        for i in range(0, len(tensors), 30):
            yield tensors[i : i + 30]

    publisher = Publisher(
        export,
        c.fleet,
        RolloutConfig(publish=method, start_timeout_s=TIMEOUT_S),
        rank=0,
        agree=lambda x: x,
        run_dir=c.run_dir,
        model_dir=c.old,
        verify=c.engine == "embedded",  # SGLang's checksum needs CUDA, and is another one
    )
    publisher(version)
    publisher.close()


def post(c: Contract, body: dict[str, Any]) -> Any:
    response = c.http.post("/generate", json={"return_logprob": True, **body})
    assert response.status_code == 200, response.text
    return response.json()


def in_time(attempt: Callable[[], T | None]) -> T:
    """What `attempt` gives. None is for a request that was over before anything was done to it, as happens when the
    test gets no turn on a busy machine: then it is made again.
    """
    found = next((result for result in (attempt() for _ in range(5)) if result is not None), None)
    assert found is not None, "the request is always over too soon"
    return found


def flush_while_running(c: Contract, thread: threading.Thread) -> int:
    """What /flush_cache says once the request of `thread` runs, or is over."""
    while (status := c.http.post("/flush_cache").status_code) == 200 and thread.is_alive():  # refused once it runs
        time.sleep(0.05)
    return status


class InFlight:
    """A long request in a thread of its own."""

    def __init__(self, c: Contract, rid: str) -> None:
        self._thread = threading.Thread(target=self._run, args=(c, rid))
        self._thread.start()
        self.flushed = flush_while_running(c, self._thread)

    def _run(self, c: Contract, rid: str) -> None:
        self.answer = post(c, {"rid": rid, "input_ids": [5, 6, 7], "sampling_params": LONG})

    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(TIMEOUT_S)
        assert not self.running()
        assert len(self.answer["meta_info"]["output_token_logprobs"]) == len(self.answer["output_ids"])
        return self.answer
