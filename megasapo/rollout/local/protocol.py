"""SGLang's /generate: from a JSON body to checked sequences, and from finished sequences to its answers.

Pure functions; fields that would change the result and are not implemented are refused by name, never ignored.
"""

from __future__ import annotations

import base64
import os
import sys
import uuid
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megasapo.rollout.local.model import Loaded
from megasapo.rollout.local.sampling import derived_seed
from megasapo.rollout.local.sequence import Sampling, Sequence

TOP_K_ALL = 1 << 30
MAX_SEQUENCES = 4096  # of one request

# fmt: off
FIELDS = frozenset((
    "rid", "text", "input_ids", "sampling_params", "return_logprob", "logprob_start_len", "return_text_in_logprobs",
    "stream", "return_routed_experts", "routed_experts_start_len",
))
SAMPLING_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 128, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "min_new_tokens": 0, "n": 1,
    "stop": [], "stop_token_ids": [], "ignore_eos": False, "skip_special_tokens": True, "no_stop_trim": False,
    "sampling_seed": 0,  # of its type only: without one it is random
}
# Fields of SGLang's that do not change what is generated.
HARMLESS = frozenset((
    "log_metrics", "no_logs", "priority", "routing_key", "conversation_id", "custom_labels", "external_trace_header",
    "received_time", "modalities", "extra_key", "cache_salt", "background", "http_worker_ipc", "data_parallel_rank",
    "routed_dp_rank", "lora_id", "bootstrap_host", "bootstrap_port", "bootstrap_room", "kv_hints",
))
# Fields that are accepted at these values only; `model` is sglang-router's.
NEUTRAL: dict[str, tuple[Any, ...]] = dict.fromkeys((
    "input_embeds", "image_data", "video_data", "audio_data", "top_logprobs_num", "token_ids_logprob",
    "return_sampling_mask", "sampling_logprobs_mode", "return_hidden_states", "return_indexer_topk", "session_params",
    "lora_path", "return_bytes", "custom_logit_processor", "positional_embed_overrides", "return_entropy",
    "return_prompt_token_ids", "require_reasoning", "max_thinking_tokens", "return_flat_raw_top_logprobs",
    "return_flat_raw_top_logprobs_b64", "model",
), (None, False, 0, [], ""))
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = dict.fromkeys((
    "json_schema", "regex", "ebnf", "structural_tag", "stop_regex", "custom_params",
), (None, "", [], {})) | {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "beam_width": (None, 1),
    "spaces_between_special_tokens": (None, True),
    "stream_interval": (None, 1),
}
# fmt: on


class BadRequest(ValueError):
    """A request cannot be served, or a control call carried out; the message says why. Answered with HTTP 400."""


@dataclass(frozen=True, slots=True)
class Generate:
    """A checked /generate request."""

    sequences: list[Sequence]
    many: bool  # answered by a list
    stream: bool
    text_in_logprobs: bool


def parse(body: Any, loaded: Loaded, max_total_tokens: int, routing: bool) -> Generate:
    """Raises BadRequest. `routing`: whether the server records it; if not, asking is silently in vain, as in SGLang."""
    if not isinstance(body, dict):
        raise BadRequest(f"expected a JSON object, found {type(body).__name__}")
    check_known(body, FIELDS, NEUTRAL, HARMLESS)
    prompts, many = _prompts(body, loaded)
    count = len(prompts)
    params = [_checked_params(p) for p in _each(body, "sampling_params", count, dict, {})]
    copies = {p["n"] for p in params}
    if len(copies) > 1:
        raise BadRequest(f"sampling_params.n differs within one request: {sorted(copies)}")
    n = copies.pop()
    if count * n > MAX_SEQUENCES:
        raise BadRequest(f"{count} prompts times n={n} are more than {MAX_SEQUENCES} sequences")
    rids = _rids(body, count, many, n)
    want_logprob = _each(body, "return_logprob", count, bool, False)
    start = _each(body, "logprob_start_len", count, int, -1)
    routing_start = field(body, "routed_experts_start_len", int, 0)
    want_routing = field(body, "return_routed_experts", bool, False)
    sequences = []
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        _check_lengths(len(prompt), p["max_new_tokens"], loaded.context_length, max_total_tokens)
        _check_starts(len(prompt), start[i], routing_start)
        sampling = _sampling(p, loaded)
        for copy in range(n):
            sequences.append(
                Sequence(
                    rids[i * n + copy],
                    prompt,
                    replace(sampling, seed=derived_seed(sampling.seed, copy)),
                    return_logprob=want_logprob[i],
                    logprob_start=start[i],
                    return_routing=want_routing and routing,
                    routing_start=routing_start,
                )
            )
    text = field(body, "return_text_in_logprobs", bool, False)
    return Generate(sequences, many or n > 1, field(body, "stream", bool, False), text)


def answer(s: Sequence, loaded: Loaded, weight_version: str, text_in_logprobs: bool) -> dict[str, Any]:
    """What SGLang answers for one sequence, finished or (streaming) not."""
    finish = s.finish  # before the tokens: when it is there, so are all of them (the engine may go on meanwhile)
    count = len(s.output)
    output = s.output[:count]
    versions = [(v, start, min(end, count)) for v, start, end in s.versions if start < count or start == 0]
    versions = versions or [(weight_version, 0, 0)]
    meta: dict[str, Any] = {
        "id": s.rid,
        "finish_reason": finish,
        "prompt_tokens": len(s.prompt),
        "weight_version": versions[-1][0],
        "num_retractions": s.retractions,
        "reasoning_tokens": 0,
        "completion_tokens": count,
        "cached_tokens": 0,
        "cached_tokens_details": None,
        "weight_versions": [{"version": v, "start": start, "end": end} for v, start, end in versions],
        "dp_rank": None,
    }
    if s.return_logprob:
        start = s.logprob_start if s.logprob_start >= 0 else len(s.prompt)
        scores = [None, *(s.prompt_logprobs or [])][: len(s.prompt) - start]
        texts = _token_texts(loaded, text_in_logprobs)
        meta["input_token_logprobs"] = [[p, t, texts(t)] for p, t in zip(scores, s.prompt[start:], strict=False)]
        meta["output_token_logprobs"] = [[p, t, texts(t)] for p, t in zip(s.logprobs, output, strict=False)]
        meta["output_token_logprobs_length"] = count
    if s.return_routing and s.routing and finish is not None:
        rows = np.concatenate(s.routing)[s.routing_start : len(s.prompt) + count - 1]
        meta["routed_experts"] = base64.b64encode(rows.astype(np.int32).tobytes()).decode()
    return {"text": _text(s, output, finish, loaded), "output_ids": output, "meta_info": meta}


def _token_texts(loaded: Loaded, wanted: bool) -> Any:
    if not wanted or loaded.tokenizer is None:
        return lambda token: None
    return lambda token: loaded.tokenizer.decode([token])  # type: ignore[union-attr]


def _text(s: Sequence, ids: list[int], finish: dict[str, Any] | None, loaded: Loaded) -> str:
    if loaded.tokenizer is None:
        return ""
    stop = None if finish is None or s.sampling.no_stop_trim else finish.get("matched")
    if isinstance(stop, int):
        ids = ids[:-1]
    text = loaded.tokenizer.decode(ids, skip_special_tokens=s.sampling.skip_special_tokens)
    if isinstance(stop, str):
        text = text.partition(stop)[0]
    if finish is None:
        text = text.rstrip("\ufffd")  # bytes of a character that is still coming
    return text


def check_known(
    given: dict[str, Any],
    fields: Collection[str],
    neutral: dict[str, tuple[Any, ...]],
    harmless: frozenset[str],
    at: str = "",
) -> None:
    """Raises BadRequest, naming the field, unless each is one of `fields`, harmless, or at a neutral value."""
    for name, value in given.items():
        if name in fields or name in harmless:
            continue
        if name not in neutral:
            raise BadRequest(f"unknown field {at}{name}")
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral[name]):
            raise BadRequest(f"{at}{name}={value!r} is not supported by the embedded server")


def field(body: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A field of the body; absent or null is the default, which a required field lacks. Raises BadRequest."""
    value = body.get(name)
    if value is not None:
        return _typed(value, kind, name)
    if default is None:
        raise BadRequest(f"the field {name} is required")
    return default


def _typed(value: Any, kind: type, name: str) -> Any:
    right = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
    if not right or (kind is not bool and isinstance(value, bool)):
        raise BadRequest(f"{name}={value!r}: expected {kind.__name__}")
    if kind is float and abs(value) > sys.float_info.max:  # an integer of hundreds of digits
        raise BadRequest(f"{name} must be a finite number that a float can hold")
    return value


def _each(body: dict[str, Any], name: str, count: int, kind: type, default: Any) -> list[Any]:
    """One value for every prompt, from one or from a list of as many."""
    value = body.get(name)
    values = value if isinstance(value, list) else [default if value is None else value] * count
    if len(values) != count:
        raise BadRequest(f"{name} has {len(values)} entries for {count} prompts")
    return [_typed(v, kind, name) for v in values]


def _prompts(body: dict[str, Any], loaded: Loaded) -> tuple[list[list[int]], bool]:
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise BadRequest("give exactly one of text and input_ids")
    if text is not None:
        if loaded.tokenizer is None:
            raise BadRequest("text needs a tokenizer, and the model directory has none: send input_ids")
        texts = text if isinstance(text, list) else [text]
        many, lists = isinstance(text, list), [loaded.tokenizer.encode(_typed(t, str, "text")) for t in texts]
    else:
        given = _typed(ids, list, "input_ids")
        many = bool(given) and isinstance(given[0], list)
        lists = given if many else [given]
    if not lists:
        raise BadRequest("no prompts given")
    for prompt in lists:
        _check_ids(_typed(prompt, list, "input_ids"), loaded.vocab_size, "input_ids")
        if not prompt:
            raise BadRequest("input_ids is empty")
    return lists, many


def _check_ids(ids: list[Any], vocab_size: int, name: str) -> None:
    for t in ids:
        if type(t) is not int or not 0 <= t < vocab_size:
            raise BadRequest(f"{name} has {t!r}: expected token ids from 0 to {vocab_size - 1}")


def _rids(body: dict[str, Any], count: int, many: bool, n: int) -> list[str]:
    if n > 1 or body.get("rid") is None:  # SGLang gives copies new ids
        return [uuid.uuid4().hex for _ in range(count * n)]
    rids = _each(body, "rid", count, str, None)
    if many and not isinstance(body["rid"], list):
        rids = [f"{rid}_{i}" for i, rid in enumerate(rids)]
    if len(set(rids)) != len(rids):
        raise BadRequest(f"rid has duplicates: {sorted({r for r in rids if rids.count(r) > 1})}")
    return rids


def _check_lengths(given: int, new: int, context: int, max_total: int) -> None:
    """SGLang's own two messages, and the cache's bound."""
    if given >= context:
        raise BadRequest(f"The input ({given} tokens) is longer than the model's context length ({context} tokens).")
    if given + new > context:
        raise BadRequest(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. You requested a "
            f"total of {given + new} tokens: {given} tokens from the input messages and {new} tokens for the "
            "completion. Please reduce the number of tokens in the input messages or the completion to fit within the "
            "limit."
        )
    if given + new > max_total:
        raise BadRequest(f"{given} prompt tokens and max_new_tokens={new} exceed the KV cache of {max_total} tokens")


def _check_starts(prompt: int, logprob_start: int, routing_start: int) -> None:
    if not -1 <= logprob_start <= prompt:
        raise BadRequest(
            f"req.logprob_start_len={logprob_start} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={prompt}. Please use a smaller logprob_start_len."
        )
    if not 0 <= routing_start <= prompt:
        raise BadRequest(
            f"recv_req.routed_experts_start_len={routing_start} is not within the number of input tokens "
            f"len(req.origin_input_ids)={prompt}. Please use a smaller routed_experts_start_len."
        )


def _checked_params(given: dict[str, Any]) -> dict[str, Any]:
    """All parameters, types and ranges as in SGLang's SamplingParams.verify; absent and null mean the default."""
    check_known(given, SAMPLING_DEFAULTS, NEUTRAL_SAMPLING, frozenset(), "sampling_params.")
    if given.get("max_new_tokens", 0) is None:  # SGLang's "as many as there is room for", not its default
        raise BadRequest("sampling_params.max_new_tokens=None is not supported by the embedded server")
    fresh = {"sampling_seed": int.from_bytes(os.urandom(8), signed=True)}
    p = SAMPLING_DEFAULTS | fresh | {name: value for name, value in given.items() if value is not None}
    if isinstance(p["stop"], str):
        p["stop"] = [p["stop"]]
    for name, default in SAMPLING_DEFAULTS.items():
        _typed(p[name], type(default), name)
    new = p["max_new_tokens"]
    ranges = {
        "temperature must be a non-negative finite number": 0 <= p["temperature"] < float("inf"),
        "top_p must be in (0, 1]": 0 < p["top_p"] <= 1,
        "min_p must be in [0, 1]": 0 <= p["min_p"] <= 1,
        "top_k must be -1 (disable) or at least 1": p["top_k"] == -1 or p["top_k"] >= 1,
        "max_new_tokens must be at least 0": new >= 0,
        f"min_new_tokens must be in [0, max_new_tokens({new})]": 0 <= p["min_new_tokens"] <= new,
        "sampling_seed must be in [-2**63, 2**63 - 1]": -(2**63) <= p["sampling_seed"] < 2**63,
        "n must be at least 1": p["n"] >= 1,
    }
    for rule, holds in ranges.items():
        if not holds:
            raise BadRequest(f"{rule}, got {p[rule.split()[0]]}.")
    return p


def _sampling(p: dict[str, Any], loaded: Loaded) -> Sampling:
    stops, stop_ids = p["stop"], p["stop_token_ids"]
    if not all(isinstance(text, str) and text for text in stops):
        raise BadRequest(f"stop={stops!r}: expected strings that are not empty")
    if stops and loaded.tokenizer is None:
        raise BadRequest("stop strings need a tokenizer, and the model directory has none: use stop_token_ids")
    _check_ids(stop_ids, loaded.vocab_size, "stop_token_ids")
    return Sampling(
        max_new_tokens=p["max_new_tokens"],
        temperature=0.0 if p["temperature"] < 1e-6 or p["top_k"] == 1 else float(p["temperature"]),
        top_p=float(p["top_p"]),
        top_k=TOP_K_ALL if p["top_k"] == -1 else min(p["top_k"], TOP_K_ALL),
        min_p=float(p["min_p"]),
        min_new_tokens=p["min_new_tokens"],
        stop_ids=frozenset() if p["ignore_eos"] else loaded.eos_ids | frozenset(stop_ids),  # as SGLang: all of them
        stop_strings=tuple(stops),
        seed=p["sampling_seed"] % 2**64,
        skip_special_tokens=p["skip_special_tokens"],
        no_stop_trim=p["no_stop_trim"],
    )
