"""Sampling against frequencies, an independent numpy filter and written numbers; the KV cache's bookkeeping."""

import numpy as np
import pytest
import torch

from megasapo.rollout.local.cache import Cache
from megasapo.rollout.local.sampling import SamplerState, derived_seed, sample, uniforms
from megasapo.rollout.local.sequence import Sampling


def sampling(**over):
    fields = {
        "max_new_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 1 << 30,
        "min_p": 0.0,
        "min_new_tokens": 0,
        "stop_ids": frozenset(),
        "stop_strings": (),
        "seed": 1,
    }
    return Sampling(**{**fields, **over})


def draw(logits, rows, positions=None):
    state = SamplerState.of(rows, logits.device)
    return sample(logits, state, positions or [0] * len(rows))


def filtered(probs, top_k, top_p, min_p):
    """The renormalised distribution of one row, written out: rank by probability, then cut."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept, mass = {}, 0.0
    for rank, i in enumerate(order):
        if rank < top_k and mass <= top_p and probs[i] >= min_p * probs[order[0]]:
            kept[i] = probs[i]
        mass += probs[i]
    return np.array([kept.get(i, 0.0) for i in range(len(probs))]) / sum(kept.values())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 99, 1.0, 0.0),
        (0.5, 99, 1.0, 0.0),
        (1.0, 3, 1.0, 0.0),
        (1.0, 99, 0.6, 0.0),
        (1.0, 99, 1.0, 0.4),
        (2.0, 5, 0.8, 0.1),
    ],
)
def test_frequencies_follow_the_distribution(temperature, top_k, top_p, min_p):
    torch.manual_seed(0)
    logits = torch.randn(8) * 1.5
    count = 20_000
    rows = [sampling(seed=i, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p) for i in range(count)]
    tokens, _ = draw(logits.expand(count, -1).contiguous(), rows)
    got = np.bincount(tokens, minlength=8) / count
    want = filtered((logits / temperature).softmax(-1).tolist(), top_k, top_p, min_p)
    assert np.abs(got - want).max() < 4 * np.sqrt(0.25 / count)  # four standard deviations of the widest bin
    assert (got[want == 0] == 0).all()


def test_logprobs_are_those_before_the_filters():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    tokens, logprobs = draw(logits, [sampling(temperature=0.5, top_k=1)])
    assert tokens == [0]
    # softmax of [4, 2, 0, -2]: 1 / (1 + e^-2 + e^-4 + e^-6) = 0.864955
    assert logprobs[0] == pytest.approx(np.log(0.8649549), abs=1e-6)


def test_greedy_and_sampled_rows_mix():
    torch.manual_seed(1)
    logits = torch.randn(6, 50)
    rows = [sampling(temperature=0.0 if i % 2 else 0.8, seed=i, top_p=0.9 if i % 3 else 1.0) for i in range(6)]
    tokens, logprobs = draw(logits.clone(), rows)
    alone = [draw(logits[i : i + 1].clone(), [rows[i]]) for i in range(6)]
    assert tokens == [t[0] for t, _ in alone]
    assert logprobs == pytest.approx([p[0] for _, p in alone])
    assert [tokens[i] for i in (1, 3, 5)] == logits[[1, 3, 5]].argmax(-1).tolist()


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((4000, 6), float("-inf"))
    logits[:, 2] = 0.0
    logits[:, 4] = -3.0
    tokens, _ = draw(logits, [sampling(seed=i) for i in range(4000)])
    assert set(tokens) == {2, 4}


def test_uniforms_depend_on_seed_and_position_only_and_are_uniform():
    seeds = np.arange(50_000, dtype=np.uint64)
    zero = np.zeros_like(seeds)
    u = uniforms(seeds, zero)
    assert (u == uniforms(seeds, zero)).all()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.006  # four standard deviations
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02  # neighbouring seeds
    v = uniforms(zero, seeds)  # neighbouring positions
    assert abs(v.mean() - 0.5) < 0.006
    assert abs(np.corrcoef(v[:-1], v[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(u[1:], v[1:])[0, 1]) < 0.02


def test_the_largest_seed_is_a_seed():
    assert derived_seed(2**64 - 1, 0) == 2**64 - 1
    assert len({derived_seed(2**64 - 1, i) for i in range(100)}) == 100
    draw(torch.zeros(1, 4), [sampling(seed=2**64 - 1)])


def test_logits_that_are_not_numbers_give_a_logprob_that_is_not_one():
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 5)
        logits[0, 3] = bad
        tokens, logprobs = draw(logits, [sampling(), sampling()])
        assert all(0 <= t < 5 for t in tokens)
        assert not np.isfinite(logprobs[0])
        assert np.isfinite(logprobs[1])


def filled(cache, rows, length):
    """Write row * 1000 + position everywhere; returns what was written."""
    row = torch.arange(rows).repeat_interleave(length)
    position = torch.arange(length).repeat(rows)
    value = (row * 1000 + position).float()[:, None, None].expand(-1, cache.num_heads, 2)
    cache.write(0, cache.slots(row, position), value, value)


def test_cache_keeps_rows_when_it_grows_and_moves():
    cache = Cache(num_layers=1, num_heads=2, max_cells=4096, max_rows=8, device=torch.device("cpu"))
    cache.reserve(3, 50)
    filled(cache, 3, 50)
    cache.reserve(4, 100)
    cache.move([2], [0], 50)
    one = torch.zeros(1, dtype=torch.int64)
    value = torch.full((1, 2, 2), -5.0)
    keys, values = cache.write(0, cache.slots(one + 3, one + 99), value, value)
    assert torch.equal(keys[0, :, :50, 0], (2000 + torch.arange(50.0)).expand(2, -1))
    assert torch.equal(values[1, :, :50, 1], (1000 + torch.arange(50.0)).expand(2, -1))
    assert (keys[3, :, 99] == -5).all()


def test_cache_stays_within_its_bound():
    cache = Cache(num_layers=1, num_heads=1, max_cells=1024, max_rows=8, device=torch.device("cpu"))
    assert cache.fits(8, 128)
    assert not cache.fits(8, 129)
    assert not cache.fits(9, 1)
    cache.reserve(8, 100)
    filled(cache, 8, 100)
    cache.reserve(2, 512)  # room for eight rows of that length is not there: the others have left
    assert (cache.rows, cache.capacity) == (2, 512)
    one = torch.ones(1, dtype=torch.int64)
    value = torch.zeros(1, 1, 2)
    keys, _ = cache.write(0, cache.slots(one, one * 511), value, value)
    assert keys.shape == (2, 1, 512, 2)
    assert torch.equal(keys[1, 0, :100, 0], 1000 + torch.arange(100.0))
