"""What a rollout server says about the experts it chose, checked and brought into the learner's form.

Called where groups become training sequences (rollout.sequences); the one place that knows which forms a server's
routing may have. It knows nothing of requests, ranks or the learner's modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NoReturn

import numpy as np

from megasapo.errors import UserError
from megasapo.geometry import Geometry

UNKNOWN = -1  # in all K places: the server did not say, the learner's router chooses
SINGLE_MIN_TOKENS = 8  # with top-1, expert 0 in every layer and for this many tokens is no coincidence


class RoutingError(UserError, ValueError):
    """A routing that must not be learned from; the message names sample, decoder layer and token."""


def storage_dtype(num_experts: int) -> np.dtype:
    """The smallest that holds every expert id: uint8 up to 256 experts, then int16, which holds UNKNOWN as well."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.int16)


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """What the routing of one model looks like."""

    num_layers: int  # all decoder layers
    moe_layers: tuple[int, ...]  # those with experts, numbered from 0: L of them
    num_experts: int  # E
    top_k: int  # K
    check: bool = True  # routing.validation: look at every choice, not only at shape and range

    @staticmethod
    def of(geometry: Geometry, *, check: bool = True) -> RoutingRule:
        """Raises RoutingError for a model without experts."""
        if not any(geometry.moe_layers):
            raise RoutingError(f"a model of model_type={geometry.model_type!r} has no experts, so no routing")
        layers = tuple(i for i, moe in enumerate(geometry.moe_layers) if moe)
        return RoutingRule(geometry.layers, layers, geometry.experts, geometry.top_k, check)

    def layers_sent(self, num_ids: int, tokens: int) -> int | None:
        """Of how many layers so many ids of a sequence of `tokens` tokens are; None: they cannot be of this model.

        All layers, or those with experts where that gives exactly a row for each token (but the last); fewer rows
        are of all layers.
        """
        for layers in (self.num_layers, len(self.moe_layers)):
            if num_ids in ((tokens - 1) * layers * self.top_k, tokens * layers * self.top_k):
                return layers
        return None if num_ids % (self.num_layers * self.top_k) else self.num_layers


def validate(routed: np.ndarray, *, tokens: int, rule: RoutingRule, where: str) -> np.ndarray:
    """[rows, L, K] of the MoE layers in order, rows <= tokens - 1, uint8 (int16: above 256 experts, or unknown rows).

    `routed` is what the server sent for a sequence of `tokens` tokens, [rows, all layers or the MoE layers, K]
    integers: tokens - 1 rows, one more (the last is dropped), or fewer (the rest is unknown); -1 in all K places is
    unknown too. `where` names the sample. RoutingError for anything else; `rule.check` looks for experts chosen twice
    and for layers that the server did not record as well.
    """
    ids = _moe_rows(routed, tokens, rule, where)
    lowest, highest = int(ids.min(initial=0)), int(ids.max(initial=0))
    # always: an id out of range would be another expert's once it is stored in a byte
    if lowest < UNKNOWN or highest >= rule.num_experts:
        bad = np.any((ids < UNKNOWN) | (ids >= rule.num_experts), axis=2)
        _refuse(ids, bad, rule, where, f"expert ids go from 0 to {rule.num_experts - 1}: is it the learner's model?")
    stored = np.ascontiguousarray(ids, dtype=np.int16 if lowest == UNKNOWN else storage_dtype(rule.num_experts))
    if rule.check:
        if lowest == UNKNOWN:
            _check_unknown(stored, rule, where)
        _check_recorded(stored, rule, where)
        _check_distinct(stored, rule, where)
    return stored


def unknown_rows(routing: np.ndarray, tokens: int) -> int:
    """Of the (tokens - 1) * L rows of a validated routing, how many are unknown."""
    missing = (tokens - 1 - len(routing)) * routing.shape[1]
    return missing + (0 if routing.dtype == np.uint8 else int((routing[:, :, 0] == UNKNOWN).sum()))


def offset_of(rollout: np.ndarray, learner: np.ndarray) -> int:
    """The shift s in -1, 0, 1 at which the server's row t agrees best with the learner's row t + s; 0 is right.

    Both are [rows, L, K] of one sequence; the first MoE layer decides, by the share of common experts over the rows
    that are known and that every shift has. 0 where it is no worse than the others.
    """
    rows = min(len(rollout), len(learner))
    if rows < 3:
        return 0
    inner, known = rollout[1 : rows - 1, 0].astype(np.int16), rollout[1 : rows - 1, 0, 0] != UNKNOWN

    def agreement(shift: int) -> int:
        other = learner[1 + shift : rows - 1 + shift, 0].astype(np.int16)
        return int((inner[known][:, :, None] == other[known][:, None, :]).sum())

    return max((0, -1, 1), key=agreement)


def smallest(ids: np.ndarray) -> np.ndarray:
    """The same expert ids in the smallest type that holds them; -1 is unknown."""
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    dtype = next(t for t in (np.uint8, np.int16, np.int32) if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return ids.astype(dtype)


def _moe_rows(routed: np.ndarray, tokens: int, rule: RoutingRule, where: str) -> np.ndarray:
    """The rows and layers that the learner has a use for, as they are."""
    widths = {rule.num_layers, len(rule.moe_layers)}
    if (
        routed.ndim != 3
        or routed.shape[1] not in widths
        or routed.shape[2] != rule.top_k
        or routed.dtype.kind not in "iu"
    ):
        layers = " or ".join(map(str, sorted(widths, reverse=True)))
        raise RoutingError(
            f"{where}: routing is {routed.dtype} {list(routed.shape)}, not integers of [tokens, {layers} layers, top-k "
            f"{rule.top_k}]: the server's model has other layers or another top-k than the learner's config.json; "
            "start it on model.path"
        )
    if len(routed) > tokens:
        raise RoutingError(
            f"{where}: routing has {len(routed)} rows for {tokens} tokens; at most one a token is right: it belongs to "
            "another sequence, or the server counts tokens that it did not return"
        )
    rows = routed[: tokens - 1]
    every_layer = rows.shape[1] == rule.num_layers and len(rule.moe_layers) < rule.num_layers
    return rows[:, list(rule.moe_layers)] if every_layer else rows


def _check_unknown(ids: np.ndarray, rule: RoutingRule, where: str) -> None:
    unknown = (ids == UNKNOWN).sum(axis=2)
    bad = (unknown > 0) & (unknown < rule.top_k)
    if bad.any():
        _refuse(ids, bad, rule, where, "-1 (unknown) stands in all places of a row or in none; report it to the server")


def _check_recorded(ids: np.ndarray, rule: RoutingRule, where: str) -> None:
    """Zeros are what a buffer holds that nobody wrote to."""
    remedy = "the server did not record it: use one that returns the experts of every MoE layer"
    if rule.top_k > 1:
        for column in np.flatnonzero(~ids.any(axis=(0, 2))) if len(ids) else ():
            raise RoutingError(
                f"{where}: decoder layer {rule.moe_layers[column]} has expert 0 in every place: {remedy}"
            )
    elif len(ids) >= SINGLE_MIN_TOKENS and not ids.any():
        raise RoutingError(f"{where}: every layer has expert 0 for all of {len(ids)} tokens: {remedy}")


def _check_distinct(ids: np.ndarray, rule: RoutingRule, where: str) -> None:
    """No expert twice in a top-k. Compares places pairwise: sorting so many short rows takes ten times as long."""
    places = np.ascontiguousarray(ids.reshape(-1, rule.top_k).T)  # [K, rows * L]
    twice = np.zeros(places.shape[1], dtype=bool)
    for one, other in combinations(places, 2):
        twice |= one == other
    if ids.dtype != np.uint8:
        twice &= places[0] != UNKNOWN
    if twice.any():
        what = (
            "the same expert twice in a top-k; a row of zeros is one that the server did not record: update the server"
        )
        _refuse(ids, twice.reshape(ids.shape[:2]), rule, where, what)


def _refuse(ids: np.ndarray, bad: np.ndarray, rule: RoutingRule, where: str, what: str) -> NoReturn:
    """Raise for the first of the rows where `bad` [rows, L] is true."""
    token, column = (int(x) for x in np.argwhere(bad)[0])
    row: Sequence[int] = ids[token, column].tolist()
    more = int(bad.sum()) - 1
    raise RoutingError(
        f"{where}: decoder layer {rule.moe_layers[column]}, token {token}: experts {row} (and {more} more rows): {what}"
    )
