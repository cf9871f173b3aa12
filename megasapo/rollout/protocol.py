"""What is said to a rollout server and how its answers are read: SGLang's `/generate`, as plain functions without I/O.

Used by the client and its tests. An answer that cannot be trusted (cut short, NaN, wrong version) is a BadAnswer, which
the client retries; one that no retry can mend is a RolloutError.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from megasapo.errors import UserError
from megasapo.routing.validate import RoutingRule
from megasapo.types import Completion, SamplingParams

UNSTAMPED = -1  # version of a server that no learner has published to ("default"), or whose update was cut short
INCOMPLETE = "incomplete"  # the stamp of a server that holds parts of two versions


class RolloutError(UserError, RuntimeError):
    """A rollout server cannot do what was asked, or its retries are spent; the message has the server's own."""


class Retryable(RolloutError):
    """One attempt failed in a way that another may not: connection, timeout, 429, 5xx."""


class BadAnswer(Retryable):
    """An answer came, but not one to learn from: truncated, not finite, aborted."""


class WrongVersion(BadAnswer):
    """Sampled with weights that this learner does not allow now."""


class Refused(RolloutError):
    """The server answered 4xx: asking again would not help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def generate_request(
    input_ids: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    *,
    return_routed_experts: bool,
    rid: str | None = None,
) -> dict[str, Any]:
    """The JSON body of one `/generate` for a list of prompts, each with its own sampling.

    `rid`: what the request's ids begin with.
    """
    if len(input_ids) != len(sampling):
        raise ValueError(f"{len(input_ids)} prompts but {len(sampling)} sampling parameters")
    fields = [_sampling(s) for s in sampling]
    body: dict[str, Any] = {
        "input_ids": [list(ids) for ids in input_ids],
        "sampling_params": fields[0] if len(fields) == 1 else fields,  # sglang-router takes no list of them
        "return_logprob": True,
        "return_text_in_logprobs": False,
    }
    if return_routed_experts:
        body["return_routed_experts"] = True
    if rid is not None:
        body["rid"] = rid
    return body


def _sampling(s: SamplingParams) -> dict[str, Any]:
    """Every field, so that a server's own defaults (generation_config.json) change nothing."""
    fields: dict[str, Any] = {
        "max_new_tokens": s.max_new_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k,
        "min_p": s.min_p,
        "stop_token_ids": list(s.stop_token_ids),
        "ignore_eos": s.ignore_eos,
    }
    if s.sampling_seed is not None:
        fields["sampling_seed"] = s.sampling_seed
    return fields


def read_completions(
    body: Any,
    input_ids: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    routed: RoutingRule | None = None,
    *,
    partial: bool = False,
) -> list[Completion]:
    """The completions in a `/generate` answer, in the order of the prompts; `routed`: routing was asked for.

    `partial`: what was aborted comes as far as it got, with finish_reason abort.
    """
    answers = [body] if isinstance(body, dict) else body
    if not isinstance(answers, list) or len(answers) != len(input_ids):
        what = f"{len(answers)} answers" if isinstance(answers, list) else type(answers).__name__
        raise BadAnswer(f"asked for {len(input_ids)} completions, the server sent {what}")
    return [
        _read_completion(answer, len(prompt), s.max_new_tokens, routed, partial)
        for answer, prompt, s in zip(answers, input_ids, sampling, strict=True)
    ]


def _read_completion(
    answer: Any, num_prompt: int, max_new_tokens: int, routed: RoutingRule | None, partial: bool
) -> Completion:
    try:
        meta = answer["meta_info"]
        output_ids = answer["output_ids"]
        reason = meta["finish_reason"]["type"]
        if reason == "abort" and (not partial or meta["finish_reason"].get("status_code")):
            raise BadAnswer(f"the server aborted the request: {meta['finish_reason'].get('message')}")
        entries = meta["output_token_logprobs"]
        logprobs, tokens = [entry[0] for entry in entries], [entry[1] for entry in entries]
        spans = _version_spans(meta, len(output_ids))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as e:
        raise BadAnswer(f"the answer lacks a field, or has it of a wrong kind: {type(e).__name__}: {e}") from e
    if reason not in ("stop", "length", "abort"):
        raise BadAnswer(f"unknown finish_reason {reason!r}")
    if not isinstance(output_ids, list) or set(map(type, output_ids)) - {int} or min(output_ids, default=0) < 0:
        raise BadAnswer("output_ids are not all non-negative integers")
    if not (reason != "abort") <= len(output_ids) <= max_new_tokens:
        raise BadAnswer(f"{len(output_ids)} output tokens for max_new_tokens={max_new_tokens}")
    if tokens != output_ids:
        raise BadAnswer(f"output_token_logprobs ({len(tokens)}) do not belong to output_ids ({len(output_ids)})")
    return Completion(
        output_ids=tuple(output_ids),
        logprobs=_finite_logprobs(logprobs),
        finish_reason=reason,
        version_min=min(version for version, _, _ in spans),
        version_max=max(version for version, _, _ in spans),
        routed_experts=_routed(meta, num_prompt + len(output_ids), routed) if routed and output_ids else None,
        version_spans=spans,
    )


def _finite_logprobs(values: list[Any]) -> np.ndarray:
    """[R] float32. A server's NaN arrives as NaN or, through a strict JSON writer, as null."""
    try:
        logprobs = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as e:
        raise BadAnswer(f"logprobs are not numbers: {e}") from e
    bad = np.flatnonzero(~np.isfinite(logprobs))
    if bad.size:
        first = logprobs[bad[0]]
        raise BadAnswer(f"{bad.size} of {logprobs.size} logprobs are not finite, the first at {bad[0]}: {first}")
    return logprobs


def _version_spans(meta: dict[str, Any], tokens: int) -> tuple[tuple[int, int, int], ...]:
    """(version, start, end) of the output; servers before 0.5.18 know only the version of the last token."""
    spans = meta.get("weight_versions")
    if not spans:
        return ((parse_version(meta["weight_version"]), 0, tokens),)
    return tuple((parse_version(s["version"]), int(s["start"]), int(s["end"])) for s in spans)


def parse_version(stamp: Any) -> int:
    """The learner's version, UNSTAMPED for anything but a number."""
    text = str(stamp)
    return int(text) if text.isascii() and text.isdigit() else UNSTAMPED


def _routed(meta: dict[str, Any], tokens: int, rule: RoutingRule) -> np.ndarray:
    """[rows, layers, K] int32 as the server sent it; what it says is for routing.validate to judge."""
    encoded = meta.get("routed_experts")
    if encoded is None:
        raise RolloutError(
            "the server sent no routed_experts: start it with --enable-return-routed-experts, and name it in "
            "rollout.servers itself, for sglang-router does not pass the question on"
        )
    try:
        flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.int32)
    except (binascii.Error, ValueError, TypeError) as e:
        raise BadAnswer(f"routed_experts cannot be decoded: {e}") from e
    layers = rule.layers_sent(flat.size, tokens)
    if layers is None:
        raise RolloutError(
            f"routed_experts has {flat.size} ids, no multiple of {rule.num_layers} layers * top-k {rule.top_k}: the "
            "server's model has other layers or another top-k than the learner's config.json"
        )
    return flat.reshape(-1, layers, rule.top_k)


def check_versions(completions: Sequence[Completion], lowest: int | None, highest: int | None) -> None:
    """Raise WrongVersion unless every token's version lies in [lowest, highest]; None is no bound."""
    for c in completions:
        if (lowest is not None and c.version_min < lowest) or (highest is not None and c.version_max > highest):
            raise WrongVersion(
                f"sampled with weight versions {c.version_min}..{c.version_max}, allowed are {lowest}..{highest}"
            )
