"""What the contract tests ask of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.torch import load_file

from megasapo.publish import Bucket, Publisher
from megasapo.sections import RolloutConfig
from megasapo.types import Completion, SamplingParams
from tests.sglang.conftest import Contract
from tests.sglang.path.brake import felt_at
from tests.sglang.reference import greedy_of, logprobs_of

PROMPTS = [(5, 6, 7), (300, 41, 9, 17, 400, 401, 402), (64,)]
GREEDY = SamplingParams(max_new_tokens=16, temperature=0.0, ignore_eos=True)
LONG = {"max_new_tokens": 1500, "temperature": 0.0, "ignore_eos": True}
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


def long_request(c: Contract) -> Any:
    answer = post(c, {"rid": "long", "input_ids": [5, 6, 7], "sampling_params": LONG})
    assert len(answer["meta_info"]["output_token_logprobs"]) == len(answer["output_ids"])
    return answer


@contextmanager
def in_flight(c: Contract, ask: Callable[[Contract], T]) -> Iterator[Future[T]]:
    """What `ask`, a long request, will come to. It has its first token, and the rest would take minutes (path/brake.py)
    as long as the block lasts; then it goes on at full speed, and is over.
    """
    felt = felt_at(c.brake)
    felt.unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as pool:
        c.brake.touch()
        try:
            request = pool.submit(ask, c)
            until(lambda: felt.exists() or request.done())
            if not felt.exists():
                raise AssertionError(f"it never ran, and came to {request.result()}")
            yield request
        finally:
            c.brake.unlink()


@contextmanager
def paused(c: Contract, mode: str) -> Iterator[None]:
    assert c.http.post("/pause_generation", json={"mode": mode}).json()["status"] == "ok"
    try:
        yield
    finally:
        assert c.http.post("/continue_generation", json={}).status_code == 200


def flush(c: Contract) -> None:
    """Once nothing runs: the fleet's health checks may."""
    until(lambda: c.http.post("/flush_cache").status_code == 200)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
