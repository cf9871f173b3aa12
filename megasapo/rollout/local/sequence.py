"""One sequence being generated, and the job (one HTTP request) it belongs to.

Filled in by the engine thread, read by the HTTP side once finished. Must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence is sampled; already checked."""

    max_new_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    top_k: int  # vocabulary size when off
    min_p: float
    min_new_tokens: int
    stop_ids: frozenset[int]  # end of sequence included unless ignored
    stop_strings: tuple[str, ...]
    seed: int  # 64 bits
    skip_special_tokens: bool = True
    no_stop_trim: bool = False

    @property
    def filters(self) -> bool:
        return self.top_p < 1 or self.min_p > 0 or self.top_k < 1 << 30


@dataclass(slots=True)
class Sequence:
    """P prompt tokens and what was generated so far."""

    rid: str
    prompt: list[int]
    sampling: Sampling
    return_logprob: bool = False
    logprob_start: int = -1  # first prompt position to score; -1: none
    return_routing: bool = False
    routing_start: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] | None = None  # of prompt tokens logprob_start + 1 ... P - 1
    routing: list[np.ndarray] = field(default_factory=list)  # [tokens, layers, K] pieces, in order
    versions: list[tuple[str, int, int]] = field(default_factory=list)  # (version, start, end) over output
    finish: dict[str, Any] | None = None  # with the stop string or token that ended it, if one did, as `matched`
    retractions: int = 0

    def tokens(self) -> list[int]:
        return self.prompt + self.output

    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    def scores_prompt(self) -> bool:
        """Whether prompt logprobs are wanted and not there yet."""
        wanted = self.return_logprob and 0 <= self.logprob_start < len(self.prompt) - 1
        return wanted and self.prompt_logprobs is None

    def routed_rows(self) -> int:
        return sum(len(piece) for piece in self.routing)

    def append(self, token: int, logprob: float, version: str) -> None:
        count = len(self.output)
        self.logprobs.append(logprob)
        self.output.append(token)  # after its logprob: a streaming reader on another thread counts by `output`
        if self.versions and self.versions[-1][0] == version:
            version, start, _ = self.versions[-1]
            self.versions[-1] = (version, start, count + 1)
        else:
            self.versions.append((version, count, count + 1))

    def abort(self, message: str, status: int | None = None) -> None:
        """End with what is there. `status`: the request as a whole has failed with it."""
        self.finish = {"type": "abort", "message": message, "status_code": status, "err_type": None}


@dataclass(slots=True)
class Job:
    """The sequences of one HTTP request. `notify(error)` is called from the engine thread."""

    sequences: list[Sequence]
    notify: Callable[[Exception | None], None]
    stream: bool = False

    def finished(self) -> bool:
        return all(s.finish is not None for s in self.sequences)
