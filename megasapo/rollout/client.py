"""The client of one rollout server: SGLang's HTTP protocol over aiohttp, one attempt a call, and the retry loop.

The fleet (generation) and publish (weights) call it. A client belongs to the event loop it is first used in. It knows
nothing of processes, versions of the learner, or torch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import orjson

from megasapo.keys import Keys
from megasapo.rollout.protocol import (
    INCOMPLETE,
    BadAnswer,
    Refused,
    Retryable,
    RolloutError,
    generate_request,
    read_completions,
)
from megasapo.routing.validate import RoutingRule
from megasapo.types import Completion, SamplingParams

log = logging.getLogger(__name__)
T = TypeVar("T")
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 3.0
KEEPALIVE_S = 4.0  # SGLang closes an idle connection after 5
RESUME_FOR_S = 3.0
PauseMode = Literal["abort", "in_place", "retract"]
_jitter = random.Random()  # its own generator: waiting must not move anybody's seeded stream


async def retrying(
    attempt: Callable[[], Awaitable[T]], *, what: str, for_s: float, on_retry: Callable[[Retryable], None] | None = None
) -> T:
    """Repeat `attempt` while it raises Retryable, with exponential backoff and jitter; RolloutError after `for_s`.

    The ceiling counts from the first failure, so that a long request that times out once still has its retries.
    `on_retry` is told of each failure, in place of the log.
    """
    wait_s, attempts, failing_since = FIRST_WAIT_S, 0, 0.0
    while True:
        attempts += 1
        try:
            return await attempt()
        except Retryable as e:
            now = time.monotonic()
            failing_since = failing_since or now
            left_s = failing_since + for_s - now
            if left_s <= 0:
                raise RolloutError(
                    f"{what} failed for {now - failing_since:.1f} s in {attempts} attempts (ceiling {for_s:g} s), "
                    f"at last: {e}"
                ) from e
            if on_retry is not None:
                on_retry(e)
            else:
                log.warning("%s, attempt %d: %s", what, attempts, e)
        await asyncio.sleep(min(left_s, wait_s * _jitter.uniform(0.5, 1.0)))
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


@dataclass(slots=True)
class Update:
    """One update of a server's weights."""

    begun: bool = False  # something was sent: the server may hold parts of two versions


class ServerClient:
    """One server. Every method is one attempt and raises Retryable (try again) or RolloutError (do not)."""

    def __init__(
        self,
        url: str,
        keys: Keys | None = None,
        *,
        request_timeout_s: float = 600.0,
        question_timeout_s: float = 30.0,
    ) -> None:
        """`request_timeout_s`: of generation and control. `question_timeout_s`: of health and info; SGLang's health
        takes at least a second."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"server URL {url!r} does not start with http:// or https://")
        self.url = url.rstrip("/")
        self._keys = keys or Keys()
        self._request_timeout_s, self._question_timeout_s = request_timeout_s, question_timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """End all connections; what still waits for an answer gets a Retryable. The next request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # --- generation ---

    async def generate(
        self,
        input_ids: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        *,
        routed: RoutingRule | None = None,
        rid: str | None = None,
        partial: bool = False,
    ) -> list[Completion]:
        """One list request, one completion for each prompt. A malformed answer is a BadAnswer.

        `routed`: ask for the experts too, of a model with this routing. `rid`: what `abort` may call it by. `partial`:
        an aborted answer comes as far as it got (finish_reason abort), otherwise it is a BadAnswer as well.
        """
        body = generate_request(input_ids, sampling, return_routed_experts=routed is not None, rid=rid)
        content = await self._call("POST", "/generate", body, timeout_s=self._request_timeout_s)
        answer = self._parsed("/generate", content)
        try:
            return read_completions(answer, input_ids, sampling, routed, partial=partial)
        except RolloutError as e:
            e.args = (f"{self.url}: {e.args[0]}",)
            raise

    async def check_health(self) -> None:
        """Raises Retryable unless the server is up and its model generates a token."""
        await self._ask("/health_generate")

    async def model_info(self) -> dict[str, Any]:
        return await self._question("/model_info")

    async def server_info(self) -> dict[str, Any]:
        return await self._question("/server_info")

    # --- control ---

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling: abort what runs, or keep it with (in_place) or without (retract) its KV cache."""
        await self._control("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._control("/continue_generation", {})

    async def _resume_surely(self) -> None:
        """A server left paused would keep every request waiting."""
        await retrying(self.resume, what=f"resuming {self.url}", for_s=RESUME_FOR_S)

    async def abort(self, rid: str) -> None:
        """Abort one request; its answer comes with finish_reason abort."""
        await self._control("/abort_request", {"rid": rid}, parse=False)

    async def flush(self, mode: PauseMode = "retract") -> None:
        """Forget cached prefixes; Refused while requests hold them, as those that are paused in place may."""
        try:
            await self._control("/flush_cache", None, parse=False)
        except Refused:
            if mode != "in_place":
                raise

    # --- weights ---

    @asynccontextmanager
    async def updating(self, version: int, mode: PauseMode, *, session: bool = True) -> AsyncIterator[Update]:
        """pause -> begin -> what the caller does -> end -> flush -> stamp -> resume. `mode`: of the pause.

        `session`: with begin and end, which an update from disk does without. Whatever goes wrong, a server that may
        hold parts of two versions is stamped so, or stays paused when it cannot be reached: it never samples under a
        version that it has not.
        """
        update = Update()
        try:
            await self.pause(mode)
            session = session and await self.begin_update()
            yield update
            if session:
                await self.end_update()
            await self.flush(mode)
            await self.stamp(version)
        except (Exception, asyncio.CancelledError):
            with suppress(RolloutError):
                if update.begun:
                    await self.stamp(INCOMPLETE)
                with suppress(RolloutError):  # it may have ended, or another learner's that was killed may be open
                    await self.end_update()
                await self._resume_surely()
            raise
        await self._resume_surely()

    async def load_from_disk(self, directory: Path, version: int, mode: PauseMode) -> None:
        """All of an update from an HF directory that the server can read; the old weights stay where that fails.

        The server stamps what it loads by itself, so that it is right even if its answer never comes.
        """
        async with self.updating(version, mode, session=False):
            # SGLang dies if it is to flush while requests hold the cache, as those that are paused in place do
            body = {"model_path": str(directory), "weight_version": str(version), "flush_cache": mode != "in_place"}
            await self._control("/update_weights_from_disk", body)

    async def begin_update(self) -> bool:
        """Open a session for update_from_*; False where the server knows none (SGLang up to 0.5.17)."""
        try:
            await self._control("/begin_weight_update", {})
        except Refused as e:
            if e.status == 404:
                return False
            raise
        return True

    async def end_update(self) -> None:
        await self._control("/end_weight_update", {})

    async def init_group(self, **member: str | int) -> None:
        """Join a WeightGroup: `master_address`, `master_port`, `rank_offset`, `world_size`, `group_name`, `backend`.

        Returns when every member has.
        """
        await self._control("/init_weights_update_group", member)

    async def destroy_group(self, name: str) -> None:
        await self._control("/destroy_weights_update_group", {"group_name": name})

    async def update_from_distributed(self, group: str, dtype: str, shapes: dict[str, list[int]]) -> None:
        """Receive tensors of these names and shapes, which rank 0 broadcasts meanwhile as one uint8 bucket."""
        body = {
            "names": list(shapes),
            "dtypes": [dtype] * len(shapes),
            "shapes": list(shapes.values()),
            "group_name": group,
            # SGLang asserts that this flush succeeds and dies if requests hold the cache: flush() afterwards instead
            "flush_cache": False,
            "load_format": "flattened_bucket",
        }
        await self._control("/update_weights_from_distributed", body)

    async def update_from_tensor(self, payloads: list[str]) -> None:
        """Copy tensors that lie in memory of this machine; one payload for each rank of the server (see handover)."""
        body = {"serialized_named_tensors": payloads, "load_format": None, "flush_cache": False}
        await self._control("/update_weights_from_tensor", body)

    async def stamp(self, version: int | str) -> None:
        """Set the version of the weights in place; requests in flight stay."""
        await self._control("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    async def checksum(self) -> str:
        """The embedded server's hash of its weights (megasapo.checksum). SGLang's own is another one: RolloutError."""
        answer = await self._control("/weights_checker", {"action": "checksum"})
        if not isinstance(answer.get("checksum"), str):
            raise RolloutError(f"{self.url}: /weights_checker gave no checksum that can be compared: {list(answer)}")
        return answer["checksum"]

    # --- transport ---

    async def _question(self, path: str) -> dict[str, Any]:
        return self._object(path, await self._ask(path))

    async def _ask(self, path: str) -> bytes:
        limit_s = self._question_timeout_s
        return await self._call("GET", path, None, timeout_s=limit_s, setting="rollout.health_timeout_s")

    async def _control(self, path: str, body: dict[str, Any] | None, *, parse: bool = True) -> dict[str, Any]:
        content = await self._call("POST", path, body, timeout_s=self._request_timeout_s, control=True)
        answer = self._object(path, content) if parse else {}
        if answer.get("success") is False:
            raise Refused(f"{self.url}{path}: {answer.get('message')}", 200)
        return answer

    def _object(self, path: str, content: bytes) -> dict[str, Any]:
        answer = self._parsed(path, content)
        if not isinstance(answer, dict):
            raise BadAnswer(f"{self.url}{path}: expected a JSON object, got {type(answer).__name__}")
        return answer

    def _parsed(self, path: str, content: bytes) -> Any:
        with suppress(ValueError):
            return orjson.loads(content)
        try:
            return json.loads(content)  # takes NaN, which the reader of the answer finds; or says better what is wrong
        except ValueError as e:
            raise BadAnswer(f"{self.url}{path}: {len(content)} bytes that are not JSON: {e}") from e

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        *,
        timeout_s: float,
        setting: str = "rollout.request_timeout_s",
        control: bool = False,
    ) -> bytes:
        """`setting`: where `timeout_s` is from. `control`: with the admin key, where there is one."""
        key = self._keys.control if control else self._keys.api
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        data = orjson.dumps(body) if body is not None else None
        try:
            async with asyncio.timeout(timeout_s):
                async with self._connections().request(
                    method, self.url + path, data=data, headers=headers, allow_redirects=False
                ) as response:
                    status, content = response.status, await response.read()
        except aiohttp.ClientError as e:  # its timeouts too, which are TimeoutErrors
            raise Retryable(f"{self.url}{path}: {type(e).__name__}: {e}") from e
        except TimeoutError as e:
            raise Retryable(f"{self.url}{path}: no answer in {setting}={timeout_s:g}") from e
        if status in (408, 429) or status >= 500:  # 408: out of sglang-router's queue
            raise Retryable(f"{self.url}{path}: {status}: {_message(content)}")
        if status >= 300:
            setting = "rollout.admin_api_key_file" if control else "rollout.api_key_file"
            hint = f", so it asks for another key: see {setting}" if status == 401 else ""
            raise Refused(f"{self.url}{path}: {status}: {_message(content)}{hint}", status)
        return content

    def _connections(self) -> aiohttp.ClientSession:
        """Made in the event loop that uses them. Servers are never behind a web proxy, whatever the environment says,
        and a redirection would take the key elsewhere.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
                # A request has one for everything. None for connecting: thousands may do so at once, in one thread, and
                # who waits for a machine that is gone is freed by the watch.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session


def _message(content: bytes) -> str:
    """The server's own words: SGLang says them as error.message, message or detail, or as plain text."""
    try:
        body = orjson.loads(content)
    except ValueError:
        return content.decode(errors="replace")[:500]
    if isinstance(body, dict):
        error = body.get("error")
        found = error.get("message") if isinstance(error, dict) else error
        return str(found or body.get("message") or body.get("detail") or body)[:500]
    return str(body)[:500]
