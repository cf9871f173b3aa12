"""Planning which rank trains on which sequence, and in which micro-batch. Pure integers; sees neither tokens nor ranks.

Every rank computes the same plan from the same lengths, so nothing but lengths needs to be exchanged.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

Bins = list[list[int]]


def plan(
    lengths: Sequence[int], num_ranks: int, max_tokens: int, *, uids: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """[rank][micro-batch] -> indices into lengths (ascending).

    lengths: the slots that each sequence takes, its tokens - 1. Every rank gets the same number of micro-batches (as
    few as the packing finds, at least one), each of at most max_tokens slots, some possibly empty; ranks, and the k-th
    micro-batches of all ranks, carry nearly equal sums. Deterministic. ValueError for a sequence above max_tokens,
    named by its uid when uids are given.
    """
    if num_ranks < 1 or max_tokens < 1:
        raise ValueError(f"num_ranks={num_ranks} and max_tokens={max_tokens} must be at least 1")
    _refuse_too_long(lengths, max_tokens, uids)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    num_micro = max(1, -(-sum(lengths) // (num_ranks * max_tokens)))
    while True:
        found = [
            _deal_to_ranks(bins, lengths, num_ranks, num_micro)
            for bins in (
                _level(order, lengths, num_ranks * num_micro, max_tokens),
                _first_fit(order, lengths, num_ranks * num_micro, max_tokens),
            )
            if bins is not None
        ]
        if found:
            return min(found, key=lambda ranks: _heaviest(ranks, lengths))
        num_micro += 1


def split_mini_batches(num_groups: int, mini_batches: int) -> list[range]:
    """Consecutive ranges of group numbers, as even as possible, the larger ones first. ValueError for an empty one."""
    if not 1 <= mini_batches <= num_groups:
        raise ValueError(
            f"{num_groups} groups cannot make {mini_batches} mini-batches of at least one group: "
            "lower algo.mini_batches or raise rollout.prompts_per_step"
        )
    size, extra = divmod(num_groups, mini_batches)
    starts = [i * size + min(i, extra) for i in range(mini_batches + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def _refuse_too_long(lengths: Sequence[int], max_tokens: int, uids: Sequence[int] | None) -> None:
    for i, length in enumerate(lengths):
        if length > max_tokens:
            who = f"sequence {uids[i]}" if uids is not None else f"the sequence at index {i}"
            raise ValueError(
                f"{who} takes {length} slots ({length + 1} tokens), more than train.micro_batch_tokens={max_tokens}: "
                f"raise that to at least {length}, or shorten data.max_prompt_tokens or rollout.max_new_tokens"
            )


def _level(order: list[int], lengths: Sequence[int], num_bins: int, max_tokens: int) -> Bins | None:
    """Longest first into the emptiest bin: even bins; None when one would overflow."""
    bins: Bins = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for i in order:
        load, b = heapq.heappop(heap)
        if load + lengths[i] > max_tokens:
            return None
        bins[b].append(i)
        heapq.heappush(heap, (load + lengths[i], b))
    return bins


def _first_fit(order: list[int], lengths: Sequence[int], num_bins: int, max_tokens: int) -> Bins | None:
    """Longest first into the first bin with room: fewer but uneven bins; None when they do not suffice."""
    bins: Bins = [[] for _ in range(num_bins)]
    room = [max_tokens] * num_bins
    for i in order:
        b = next((b for b in range(num_bins) if room[b] >= lengths[i]), None)
        if b is None:
            return None
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def _deal_to_ranks(bins: Bins, lengths: Sequence[int], num_ranks: int, num_micro: int) -> list[Bins]:
    """Heaviest bin to the lightest rank that still has a free place; within a rank heaviest first."""
    ranks: list[Bins] = [[] for _ in range(num_ranks)]
    heap = [(0, r) for r in range(num_ranks)]
    for load, members in sorted(((_load(b, lengths), sorted(b)) for b in bins), key=lambda x: (-x[0], x[1])):
        carried, r = heapq.heappop(heap)
        ranks[r].append(members)
        if len(ranks[r]) < num_micro:
            heapq.heappush(heap, (carried + load, r))
    return ranks


def _load(members: list[int], lengths: Sequence[int]) -> int:
    return sum(lengths[i] for i in members)


def _heaviest(ranks: list[Bins], lengths: Sequence[int]) -> int:
    return max(sum(_load(b, lengths) for b in rank) for rank in ranks)
