"""One sequence made of several requests: sampled pieces and given ones, put together as a single Completion.

Used where a request goes on after an abort (fleet) and where an episode calls the engine several times (episode). Pure;
it knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np

from megasapo.rollout.protocol import RolloutError
from megasapo.types import Completion, FinishReason, SamplingParams

MOST_FRUITLESS = 20  # aborts in a row without a token
Generate = Callable[[list[tuple[int, ...]], list[SamplingParams]], Awaitable[list[Completion]]]


class Transcript:
    """The tokens of a prompt and what has come after it, with all that servers said of those they sampled."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt_tokens = len(prompt)
        self.ids = list(prompt)
        self._logprobs: list[np.ndarray] = []
        self._sampled: list[np.ndarray] = []
        self._spans: list[tuple[int, int, int]] = []
        self._routed: list[np.ndarray] = []
        self._rows = 0

    @property
    def output_ids(self) -> tuple[int, ...]:
        return tuple(self.ids[self.prompt_tokens :])

    def given(self, ids: Sequence[int]) -> None:
        """Tokens that no server sampled: they are read, not learned from."""
        self.ids += ids
        self._logprobs.append(np.zeros(len(ids), dtype=np.float32))
        self._sampled.append(np.zeros(len(ids), dtype=bool))

    def sampled(self, completion: Completion) -> None:
        """What a server answered to a request for all tokens so far."""
        at = len(self.ids) - self.prompt_tokens
        self.ids += completion.output_ids
        self._logprobs.append(completion.logprobs)
        self._sampled.append(np.ones(len(completion.output_ids), dtype=bool))
        self._add_spans([(version, at + start, at + end) for version, start, end in completion.version_spans])
        if completion.routed_experts is not None:
            self._add_routing(completion.routed_experts)

    def completion(self, finish_reason: FinishReason, version: int | None = None) -> Completion:
        """Everything after the prompt; versions are those of sampled tokens, `version` where there are none."""
        mask = np.concatenate(self._sampled) if self._sampled else np.zeros(0, dtype=bool)
        versions = [v for v, _, _ in self._spans] or ([] if version is None else [version])
        return Completion(
            output_ids=self.output_ids,
            logprobs=np.concatenate(self._logprobs) if self._logprobs else np.zeros(0, dtype=np.float32),
            finish_reason=finish_reason,
            version_min=min(versions),
            version_max=max(versions),
            routed_experts=np.concatenate(self._routed) if self._routed else None,
            version_spans=tuple(self._spans),
            sampled=None if mask.all() else mask,
        )

    def _add_spans(self, spans: list[tuple[int, int, int]]) -> None:
        for version, start, end in (s for s in spans if s[1] < s[2]):
            if self._spans and self._spans[-1][0] == version and self._spans[-1][2] == start:
                version, start, _ = self._spans.pop()
            self._spans.append((version, start, end))

    def _add_routing(self, routed: np.ndarray) -> None:
        """Rows that an earlier request returned stay: they are what those tokens were sampled with.

        A row is an input token's; the last token has none until a later request reads it. Rows that nobody returned are
        missing at the end, where the learner's own routers choose.
        """
        if self._routed and self._routed[0].shape[1:] != routed.shape[1:]:
            raise RolloutError(
                f"a server sent routing of {list(routed.shape[1:])} (layers, top-k) for one part of a sample and of "
                f"{list(self._routed[0].shape[1:])} for another: do all servers run the same model and version?"
            )
        new = routed[self._rows : len(self.ids) - 1]
        self._routed.append(new)
        self._rows += len(new)


async def to_the_end(generate: Generate, ids: tuple[int, ...], sampling: SamplingParams) -> Completion:
    """One completion, asked for again from its prefix whenever a server aborts it (finish_reason abort)."""
    [done] = await generate([ids], [sampling])
    if done.finish_reason != "abort":
        return done
    whole, fruitless = Transcript(ids), 0
    while True:
        whole.sampled(done)
        left = sampling.max_new_tokens - len(whole.output_ids)
        if done.finish_reason != "abort" or left == 0:
            return whole.completion("length" if done.finish_reason == "abort" else done.finish_reason)
        fruitless = 0 if done.output_ids else fruitless + 1
        if fruitless == MOST_FRUITLESS:
            raise RolloutError(f"a request was aborted {fruitless} times in a row before its first token")
        [done] = await generate([tuple(whole.ids)], [replace(sampling, max_new_tokens=left)])
