"""Plans: complete, within the budget, equal in number, balanced, close to the fewest micro-batches."""

import itertools
import random

import pytest

from megasapo.data.balance import plan, split_mini_batches


def load(members, lengths):
    return sum(lengths[i] for i in members)


def check(ranks, lengths, num_ranks, max_tokens):
    assert len(ranks) == num_ranks
    assert len({len(rank) for rank in ranks}) == 1
    placed = [i for rank in ranks for micro in rank for i in micro]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(load(micro, lengths) <= max_tokens for rank in ranks for micro in rank)


@pytest.mark.parametrize("seed", range(40))
def test_random_plans(seed):
    rng = random.Random(seed)
    num_ranks, max_tokens = rng.choice([1, 2, 3, 8]), rng.choice([64, 300, 1000])
    spread = rng.choice([(1, max_tokens), (1, max_tokens // 8), (max_tokens // 3, max_tokens // 2)])
    lengths = [rng.randint(*spread) for _ in range(rng.choice([1, 5, 64, 200]))]
    ranks = plan(lengths, num_ranks, max_tokens)
    check(ranks, lengths, num_ranks, max_tokens)
    assert plan(lengths, num_ranks, max_tokens) == ranks
    # no packing does with fewer than the sum, nor than one bin for each that is longer than half a bin
    large = sum(2 * n > max_tokens for n in lengths)
    fewest = max(-(-sum(lengths) // max_tokens), large)
    needed = max(1, -(-fewest // num_ranks))
    assert len(ranks[0]) <= -(-(fewest * 11 // 9 + 1) // num_ranks)
    loads = [load(itertools.chain(*rank), lengths) for rank in ranks]
    assert max(loads) - min(loads) <= max_tokens
    assert needed <= len(ranks[0])


def test_short_sequences_spread_evenly():
    lengths = list(range(1, 101))
    ranks = plan(lengths, 4, 700)
    assert [len(rank) for rank in ranks] == [2, 2, 2, 2]  # 5050 tokens need 7.2 bins of 700
    loads = [load(itertools.chain(*rank), lengths) for rank in ranks]
    assert max(loads) - min(loads) <= 4
    for k in range(2):
        kth = [load(rank[k], lengths) for rank in ranks]
        assert max(kth) - min(kth) <= 6


def test_a_perfect_packing_is_found_where_levelling_fails():
    # even spreading puts 6 + 3 in both bins and has no room for the 2s; first fit does 6 + 4, 6 + 2 + 2
    ranks = plan([6, 6, 4, 2, 2], 1, 10)
    assert len(ranks[0]) == 2


def test_more_ranks_than_sequences():
    assert plan([5], 3, 10) == [[[0]], [[]], [[]]]
    assert plan([], 2, 10) == [[[]], [[]]]


def test_a_sequence_that_never_fits_is_named():
    with pytest.raises(ValueError, match=r"sequence 42 takes 11 slots \(12 tokens\).*micro_batch_tokens=10"):
        plan([3, 11], 1, 10, uids=[41, 42])
    with pytest.raises(ValueError, match="index 1 takes 11"):
        plan([3, 11], 1, 10)


def test_mini_batches_are_consecutive_and_even():
    assert split_mini_batches(8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert [len(r) for r in split_mini_batches(7, 3)] == [3, 2, 2]
    assert [i for r in split_mini_batches(7, 3) for i in r] == list(range(7))
    with pytest.raises(ValueError, match="3 groups cannot make 4 mini-batches"):
        split_mini_batches(3, 4)
