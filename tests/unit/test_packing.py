"""Packing: every field lines up with the token that predicts it, and comes apart again."""

import numpy as np
import pytest
import torch

from megasapo.data.packing import Shard, join, pack, pieces, sequence_mean
from megasapo.types import TrainSequence


def sequence(uid, tokens, prompt, advantage=1.0):
    n = len(tokens)
    mask = np.arange(n) >= prompt
    logp = np.where(mask, -np.arange(n) / 8, 0).astype(np.float32)
    return TrainSequence(uid, np.array(tokens, dtype=np.int32), mask, logp, advantage)


def two(rows=1):
    both = [sequence(7, [11, 12, 13, 14], 2, 0.5), sequence(9, [21, 22, 23], 1, -2.0)]
    return pack(both, [0.25, 0.125], shard=Shard(rows=rows))


def test_layout_of_two_sequences_and_padding():
    mb = two(rows=4)
    assert mb.tokens.tolist() == [11, 12, 13, 21, 22, 0, 0, 0]
    assert mb.targets.tolist() == [12, 13, 14, 22, 23, 0, 0, 0]
    assert mb.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert mb.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert mb.max_seqlen == 3
    assert mb.loss_mask.tolist() == [False, True, True, True, True, False, False, False]
    assert mb.weight.tolist() == [0, 0.25, 0.25, 0.125, 0.125, 0, 0, 0]
    assert mb.advantage.tolist() == [0.5, 0.5, 0.5, -2, -2, 0, 0, 0]
    assert mb.rollout_logp.tolist() == [0, -0.25, -0.375, -0.125, -0.25, 0, 0, 0]
    assert mb.uids == (7, 9)
    types = {name: getattr(mb, name).dtype for name in ("tokens", "cu_seqlens", "loss_mask", "weight", "rollout_logp")}
    assert types == {
        "tokens": torch.int64,
        "cu_seqlens": torch.int32,
        "loss_mask": torch.bool,
        "weight": torch.float32,
        "rollout_logp": torch.float32,
    }


def test_no_padding_sequence_when_none_is_needed():
    assert two(rows=5).cu_seqlens.tolist() == [0, 3, 5]


def test_padding_longer_than_the_sequences_counts_as_longest():
    assert two(rows=32).max_seqlen == 27


@pytest.mark.parametrize("rows", [1, 4])
def test_a_rank_without_samples_gets_padding_only(rows):
    mb = pack([], [], shard=Shard(rows=rows))
    assert mb.tokens.shape == mb.weight.shape == (rows,)
    assert mb.cu_seqlens.tolist() == [0, rows]
    assert not mb.loss_mask.any()
    assert mb.uids == ()
    assert sequence_mean(mb)(torch.full((rows,), torch.nan)).tolist() == [0] * rows


def test_sequence_mean_is_over_loss_tokens_and_passes_gradient_to_them():
    mb = two(rows=4)
    x = torch.tensor([100.0, 1, 3, 5, 9, 100, 100, 100], requires_grad=True)
    mean = sequence_mean(mb)(x)
    assert mean.tolist() == [2, 2, 2, 7, 7, 0, 0, 0]
    (mean * torch.tensor([0, 1.0, 2, 4, 8, 0, 0, 16])).sum().backward()
    assert x.grad.tolist() == [0, 1.5, 1.5, 6, 6, 0, 0, 0]


def test_values_by_sequence():
    mb = two(rows=4)
    values = join([pieces(mb, torch.arange(8, dtype=torch.bfloat16))])
    assert {uid: v.tolist() for uid, v in values.items()} == {7: [0, 1, 2], 9: [3, 4]}
    routing = join([pieces(mb, torch.zeros(8, 3, 2, dtype=torch.uint8))])
    assert routing[9].shape == (2, 3, 2)
    assert routing[9].dtype == np.uint8


def test_a_context_parallel_rank_holds_an_early_and_a_late_chunk_of_every_sequence():
    sequences = [sequence(1, range(10, 19), 1), sequence(2, range(30, 34), 2)]  # 8 and 3 slots
    shards = [pack(sequences, [1, 1], shard=Shard(cp=2, cp_rank=rank)) for rank in (0, 1)]
    assert shards[0].cu_seqlens.tolist() == [0, 8, 12]
    assert shards[0].position_ids.tolist() == [0, 1, 6, 7, 0, 3]
    assert shards[1].position_ids.tolist() == [2, 3, 4, 5, 1, 2]
    assert shards[0].tokens.tolist() == [10, 11, 16, 17, 30, 0]  # the fourth slot of the second is padding
    assert shards[0].targets.tolist() == [11, 12, 17, 18, 31, 0]
    assert shards[0].sequence.tolist() == [0, 0, 0, 0, 1, 1]
    assert shards[1].loss_mask.tolist() == [True, True, True, True, True, True]
    assert [s.loss_tokens.tolist() for s in shards] == [[8, 2], [8, 2]]
    assert shards[0].slots == (8, 3)


@pytest.mark.parametrize("lengths", [(), (9,), (9, 2, 30, 17)], ids=str)
@pytest.mark.parametrize("rows", [16, 32, 128])
@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (1, 4), (2, 1), (2, 2), (3, 2)])
def test_every_rank_has_a_multiple_of_the_rows_that_a_recipe_needs(cp, tp, rows, lengths):
    sequences = [sequence(uid, range(1, n + 1), 2) for uid, n in enumerate(lengths)]
    weights = [0.5] * len(lengths)
    shards = [pack(sequences, weights, shard=Shard(cp, c, tp, t, rows)) for c in range(cp) for t in range(tp)]
    for mb in shards:
        assert mb.tokens.numel() % rows == mb.loss_mask.numel() % rows == 0
        assert mb.loss_mask.numel() > 0
        assert mb.uids == tuple(range(len(lengths)))
        real = mb.sequence < len(lengths)
        assert not mb.loss_mask[~real].any()
        assert (mb.weight[~real] == 0).all()
    whole = pack(sequences, weights)
    for name in ("weight", "rollout_logp"):  # padding comes apart again
        got = join([pieces(mb, getattr(mb, name)) for mb in shards])
        for uid, values in join([pieces(whole, getattr(whole, name))]).items():
            np.testing.assert_array_equal(got[uid], values)


@pytest.mark.parametrize(("cp", "tp"), [(1, 2), (2, 1), (2, 2), (4, 2), (2, 4), (3, 1)])
def test_shards_hold_every_token_once_and_their_sums_make_the_mean(cp, tp):
    generator = np.random.default_rng(0)
    sequences = [sequence(uid, generator.integers(0, 99, int(n)), 2) for uid, n in enumerate((9, 2, 30, 17))]
    whole = pack(sequences, [0.5, 0.25, 0.125, 1.0])
    logp = {uid: torch.randn(s - 1) for uid, s in enumerate((9, 2, 30, 17))}
    shards = [pack(sequences, [0.5, 0.25, 0.125, 1.0], shard=Shard(cp, c, tp, t)) for c in range(cp) for t in range(tp)]
    for name in ("weight", "rollout_logp", "advantage"):
        got = join([pieces(mb, getattr(mb, name)) for mb in shards])
        want = join([pieces(whole, getattr(whole, name))])
        for uid, values in want.items():
            np.testing.assert_array_equal(got[uid], values, err_msg=f"{name} of {uid}")
    assert all(mb.tokens.numel() == mb.wanted.numel() == tp * mb.weight.numel() for mb in shards)

    def values(mb):
        found = torch.full(mb.weight.shape, torch.nan)
        for number, uid in enumerate(mb.uids):
            here = (mb.sequence == number) & (mb.position < mb.slots[number])
            found[here] = logp[uid][mb.position[here]]
        return found

    partial = [
        torch.zeros(mb.loss_tokens.numel()).index_add(0, mb.sequence, torch.where(mb.loss_mask, values(mb), 0.0))
        for mb in shards
    ]
    means = [sequence_mean(mb, lambda own: sum(partial))(values(mb)) for mb in shards]
    got = join([pieces(mb, mean) for mb, mean in zip(shards, means, strict=True)])
    for uid, value in join([pieces(whole, sequence_mean(whole)(values(whole)))]).items():
        np.testing.assert_allclose(got[uid], value, rtol=1e-5, atol=1e-6)


def test_a_missing_piece_is_noticed():
    shards = [pack([sequence(1, range(9), 1)], [1], shard=Shard(cp=2, cp_rank=rank)) for rank in (0, 1)]
    with pytest.raises(AssertionError, match="sequence 1"):
        join([pieces(shards[1], shards[1].weight)])


def test_broken_sequences_are_named():
    with pytest.raises(ValueError, match="sequence 3 has 1 tokens"):
        pack([sequence(3, [1], 1)], [1.0])
    with pytest.raises(ValueError, match=r"sequence 4: loss_mask\[0\]"):
        pack([sequence(4, [1, 2], 0)], [1.0])
    broken = TrainSequence(5, np.arange(3), np.array([False, True]), np.zeros(3, np.float32), 0.0)
    with pytest.raises(ValueError, match=r"sequence 5: .*\(3,\), \(2,\)"):
        pack([broken], [1.0])
    with pytest.raises(ValueError, match="1 sequences and 2 weights"):
        pack([sequence(3, [1, 2], 1)], [1.0, 2.0])
