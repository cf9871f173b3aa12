"""Planning which rank trains on which sequence, and in which micro-batch. Pure numbers; sees neither tokens nor ranks.

Every rank computes the same plan from the same lengths, so nothing but lengths needs to be exchanged.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

Bins = list[list[int]]


def plan(
    lengths: Sequence[int],
    num_ranks: int,
    max_tokens: int,
    *,
    uids: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
    multiple_of: int = 1,
    one_each: bool = False,
) -> list[list[list[int]]]:
    """[rank][micro-batch] -> indices into lengths (ascending).

    lengths: the slots that each sequence takes. Every rank gets the same number of micro-batches (as few as the packing
    finds, at least one, a multiple of `multiple_of`: interleaved pipelines need whole rounds of their stages), each of
    at most max_tokens slots, with `one_each` of at most one sequence, some possibly empty. Ranks, and the k-th
    micro-batches of all ranks, carry nearly equal sums of `costs` (of lengths without; see `attention_costs`).
    Deterministic. ValueError for a sequence above max_tokens, named by its uid when uids are given.
    """
    if num_ranks < 1 or max_tokens < 1 or multiple_of < 1:
        raise ValueError(
            f"num_ranks={num_ranks}, max_tokens={max_tokens} and multiple_of={multiple_of} must be at least 1"
        )
    if costs is not None and len(costs) != len(lengths):
        raise ValueError(f"{len(lengths)} lengths and {len(costs)} costs: one cost for each sequence")
    _refuse_too_long(lengths, max_tokens, uids)
    rows = _Rows(lengths, lengths if costs is None else costs, max_tokens, 1 if one_each else len(lengths))
    bins = _best_fit(rows)
    num_micro = max(1, -(-len(bins) // (num_ranks * multiple_of))) * multiple_of
    return _level(rows, num_ranks, num_micro) or _deal_to_ranks(bins, num_ranks, num_micro)


def attention_costs(lengths: Sequence[int], ratio: float) -> list[float]:
    """What each sequence costs to compute, in tokens' worth of linear layers: n + ratio * n^2 (`Geometry.cost_ratio`).

    A token costs the same in every sequence except in attention, where it meets all tokens before it.
    """
    return [n + ratio * n * n for n in lengths]


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


@dataclass(slots=True)
class _Bin:
    members: list[int] = field(default_factory=list)
    tokens: int = 0
    cost: float = 0


@dataclass(frozen=True, slots=True)
class _Rows:
    lengths: Sequence[int]
    costs: Sequence[float]
    max_tokens: int  # of a bin
    max_rows: int  # of a bin

    def put(self, i: int, into: _Bin) -> bool:
        """Whether there is room for sequence i; it is then in."""
        fits = into.tokens + self.lengths[i] <= self.max_tokens and len(into.members) < self.max_rows
        if fits:
            into.members.append(i)
            into.tokens += self.lengths[i]
            into.cost += self.costs[i]
        return fits


def _heaviest_first(weights: Sequence[float]) -> list[int]:
    """Their indices."""
    return sorted(range(len(weights)), key=lambda i: (-weights[i], i))


def _level(rows: _Rows, num_ranks: int, num_micro: int) -> list[Bins] | None:
    """Dearest first to the rank with the least, there into the cheapest bin with room; None when one fits nowhere."""
    ranks = [[_Bin() for _ in range(num_micro)] for _ in range(num_ranks)]
    least: list[tuple[float, int]] = [(0, r) for r in range(num_ranks)]
    cheapest: list[list[tuple[float, int]]] = [[(0, b) for b in range(num_micro)] for _ in range(num_ranks)]

    def put(i: int, r: int) -> bool:
        return _add(rows.costs[i], cheapest[r], lambda b: rows.put(i, ranks[r][b]))

    for i in _heaviest_first(rows.costs):
        if not _add(rows.costs[i], least, partial(put, i)):
            return None
    # within a rank dearest first, so that the k-th of all ranks are alike
    return [[sorted(b.members) for b in sorted(bins, key=lambda b: -b.cost)] for bins in ranks]


def _add(cost: float, heap: list[tuple[float, int]], takes: Callable[[int], bool]) -> bool:
    """Whether one of `heap`'s (cost, number) takes it: the least that does, whose cost then grows by `cost`."""
    passed: list[tuple[float, int]] = []
    taken = False
    while heap and not taken:
        carried, number = heapq.heappop(heap)
        taken = takes(number)
        passed.append((carried + cost if taken else carried, number))
    for entry in passed:
        heapq.heappush(heap, entry)
    return taken


def _best_fit(rows: _Rows) -> list[_Bin]:
    """Longest first into the fullest bin with room: few but uneven bins, at most 11/9 of the fewest and one more."""
    bins: list[_Bin] = []
    open_: list[tuple[int, int]] = []  # (room, bin), in order
    for i in _heaviest_first(rows.lengths):
        at = bisect.bisect_left(open_, (rows.lengths[i], 0))
        room, b = open_.pop(at) if at < len(open_) else (rows.max_tokens, len(bins))
        if b == len(bins):
            bins.append(_Bin())
        rows.put(i, bins[b])
        if len(bins[b].members) < rows.max_rows:
            bisect.insort(open_, (room - rows.lengths[i], b))
    return bins


def _deal_to_ranks(bins: list[_Bin], num_ranks: int, num_micro: int) -> list[Bins]:
    """Dearest bin to the rank with the least that still has a free place; within a rank dearest first."""
    bins = bins + [_Bin() for _ in range(num_ranks * num_micro - len(bins))]
    ranks: list[Bins] = [[] for _ in range(num_ranks)]
    heap: list[tuple[float, int]] = [(0, r) for r in range(num_ranks)]
    for found in sorted(bins, key=lambda b: (-b.cost, sorted(b.members))):
        carried, r = heapq.heappop(heap)
        ranks[r].append(sorted(found.members))
        if len(ranks[r]) < num_micro:
            heapq.heappush(heap, (carried + found.cost, r))
    return ranks
