"""Plans: complete, within the budget, equal in number, balanced, close to the fewest micro-batches."""

import itertools
import random

import pytest

from megasapo.data import balance
from megasapo.data.balance import attention_costs, plan, split_mini_batches


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


def test_nothing_is_packed_again_and_again(monkeypatch):
    """Sequences of half a micro-batch and a little need twice as many as their sum: no search goes up to there."""
    tried = []
    level = balance._level
    monkeypatch.setattr(balance, "_level", lambda *args: tried.append(args[2]) or level(*args))
    for length, in_one in ((51, 1), (34, 2)):
        ranks = plan([length] * 240, 4, 100)
        check(ranks, [length] * 240, 4, 100)
        assert tried.pop() == len(ranks[0]) == 240 // 4 // in_one
        assert tried == []


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


def long_tail(seed, count=512):
    """Response lengths as reasoning models give them: median 1800, the longest cut at 32768."""
    rng = random.Random(seed)
    return [min(32768, int(rng.lognormvariate(7.5, 1.1)) + 64) for _ in range(count)]


def worst_over_mean(ranks, costs):
    """Of the ranks' sums, and of the sum over k of the dearest k-th micro-batch (ranks that wait for each other)."""
    micro = [[load(m, costs) for m in rank] for rank in ranks]
    totals = [sum(m) for m in micro]
    mean = sum(totals) / len(totals)
    return max(totals) / mean, sum(map(max, zip(*micro))) / mean


QWEN3_30B_A3B_RATIO = 1 / 15472  # Geometry.cost_ratio: at 15 thousand tokens attention costs as much as all the rest


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_ranks", [8, 32])
def test_long_tailed_batches_are_levelled_by_attention_cost(seed, num_ranks):
    lengths = long_tail(seed)
    costs = attention_costs(lengths, QWEN3_30B_A3B_RATIO)
    by_tokens = plan(lengths, num_ranks, 32768)
    by_cost = plan(lengths, num_ranks, 32768, costs=costs)
    check(by_cost, lengths, num_ranks, 32768)
    assert len(by_cost[0]) == len(by_tokens[0])  # no more micro-batches than without
    rank, step = worst_over_mean(by_cost, costs)
    rank_before, step_before = worst_over_mean(by_tokens, costs)
    figures = f"rank {rank:.3f} (by tokens {rank_before:.3f}), in step {step:.3f} ({step_before:.3f})"
    print(f"{num_ranks} ranks, worst over mean: {figures}")
    # the longest sequence alone may be more than a rank's share
    least = max(1.0, max(costs) * num_ranks / sum(costs))
    assert rank <= 1.01 * least
    assert rank < rank_before
    assert step <= step_before


def test_costs_decide_and_tokens_limit():
    # one sequence of cost 9 against nine of cost 1: level by cost, two ranks of one micro-batch
    assert plan([9] + [3] * 9, 2, 27, costs=[9.0] + [1.0] * 9) == [[[0]], [list(range(1, 10))]]
    # the same where 27 slots do not fit: the budget wins over level cost
    ranks = plan([9] + [3] * 9, 2, 24, costs=[9.0] + [1.0] * 9)
    check(ranks, [9] + [3] * 9, 2, 24)
    assert [len(rank) for rank in ranks] == [1, 1]
    with pytest.raises(ValueError, match="2 lengths and 1 costs"):
        plan([1, 2], 1, 4, costs=[1.0])


def test_attention_costs_are_the_formula():
    assert attention_costs([0, 10, 1000], 0.01) == [0, 11, 11000]


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 4])
def test_the_number_of_micro_batches_is_a_multiple(multiple_of):
    lengths = [100] * 10
    ranks = plan(lengths, 2, 200, multiple_of=multiple_of)  # 3 a rank would do
    check(ranks, lengths, 2, 200)
    assert len(ranks[0]) == {1: 3, 2: 4, 3: 3, 4: 4}[multiple_of]
    assert len(plan([], 2, 200, multiple_of=multiple_of)[0]) == multiple_of
    with pytest.raises(ValueError, match="multiple_of=0"):
        plan(lengths, 2, 200, multiple_of=0)


@pytest.mark.parametrize("multiple_of", [1, 4])
def test_one_sequence_each(multiple_of):
    lengths = long_tail(0, 37)
    costs = attention_costs(lengths, QWEN3_30B_A3B_RATIO)
    ranks = plan(lengths, 3, 32768, costs=costs, one_each=True, multiple_of=multiple_of)
    check(ranks, lengths, 3, 32768)
    assert max(len(micro) for rank in ranks for micro in rank) == 1
    assert len(ranks[0]) == {1: 13, 4: 16}[multiple_of]  # 37 over 3 ranks
    assert plan(lengths, 3, 32768, costs=costs, one_each=True, multiple_of=multiple_of) == ranks
