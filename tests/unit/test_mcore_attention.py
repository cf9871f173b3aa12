"""Packed attention and rotary embedding against formulas in fp64, on plans of every shape."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasapo.mcore.attention import PackedAttention, PackedRotaryEmbedding, pack, plan

HEADS, GROUPS, DIM = 4, 2, 8
PACKS = [[1], [7], [1, 1, 1], [3, 30, 5, 17, 1, 64, 2], [40] * 5, [2, 4, 8, 16], [5, 0, 3]]


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def attention(**over) -> PackedAttention:
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, **over)
    return PackedAttention(config)


def inputs(num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, GROUPS, GROUPS)
    return [torch.randn(num_tokens, h, DIM, generator=generator, dtype=torch.float64).to(dtype) for h in heads]


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    """softmax(q k / sqrt d) v for each token over its own sequence's past, one head at a time, in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.zeros_like(q)
    start = 0
    for n in lengths:
        for t in range(start, start + n):
            for h in range(HEADS):
                g = h * GROUPS // HEADS
                weights = (k[start : t + 1, g] @ q[t, h] * scale).softmax(0)
                out[t, h] = weights @ v[start : t + 1, g]
        start += n
    return out.flatten(1)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_packed_attention_is_the_formula(lengths: list[int]) -> None:
    q, k, v = inputs(sum(lengths), torch.float64)
    out = attention()(q, k, v, packed_seq_params=pack(boundaries(lengths), max(lengths), positions(lengths)))
    torch.testing.assert_close(out, by_formula(q, k, v, lengths, DIM**-0.5), rtol=0, atol=1e-12)


def test_softmax_scale_is_used() -> None:
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0)
    q, k, v = inputs(5, torch.float64)
    out = PackedAttention(config, softmax_scale=0.1)(
        q, k, v, packed_seq_params=pack(boundaries([5]), 5, positions([5]))
    )
    torch.testing.assert_close(out, by_formula(q, k, v, [5], 0.1), rtol=0, atol=1e-12)


def test_bfloat16_is_near_the_formula() -> None:
    lengths = [9, 3, 20]
    q, k, v = inputs(sum(lengths), torch.bfloat16)
    out = attention()(q, k, v, packed_seq_params=pack(boundaries(lengths), 20, positions(lengths)))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), by_formula(q, k, v, lengths, DIM**-0.5), rtol=0, atol=0.03)


def test_gradients_are_the_formulas() -> None:
    lengths = [5, 1, 12, 3]
    leaves = [x.requires_grad_() for x in inputs(sum(lengths), torch.float64)]
    seed = torch.randn(sum(lengths), HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed = pack(boundaries(lengths), max(lengths), positions(lengths))
    got = torch.autograd.grad((attention()(*leaves, packed_seq_params=packed) * seed).sum(), leaves)
    want = torch.autograd.grad((by_formula(*leaves, lengths, DIM**-0.5) * seed).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_unpacked_batch_is_the_same_attention() -> None:
    q, k, v = inputs(12, torch.float64)
    stacked = [x.unflatten(0, (2, 6)).transpose(0, 1) for x in (q, k, v)]  # [s, b, heads, d]
    out = attention()(*stacked)
    expected = by_formula(q, k, v, [6, 6], DIM**-0.5).unflatten(0, (2, 6)).transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_plan_wastes_less_than_half_and_loses_no_token() -> None:
    lengths = [1, 100, 3, 7, 8, 9, 50, 51, 2]
    layout = plan(boundaries(lengths))
    slots = sum(len(bucket.rows) for bucket in layout.buckets)
    assert slots < 2 * sum(lengths)
    rows = torch.cat([bucket.rows for bucket in layout.buckets])
    torch.testing.assert_close(rows[layout.inverse], torch.arange(sum(lengths)))


@pytest.mark.parametrize("wrong", [{"context_parallel_size": 2}, {"attention_dropout": 0.1}])
def test_what_is_not_supported_is_refused(wrong: dict) -> None:
    config = SimpleNamespace(**{"context_parallel_size": 1, "attention_dropout": 0.0} | wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PackedAttention(config)


def test_masks_are_refused() -> None:
    q, k, v = inputs(4, torch.float64)
    with pytest.raises(ValueError, match="masks"):
        attention()(q, k, v, torch.ones(4, 4, dtype=torch.bool))


def test_rotary_angles_are_position_times_inverse_frequency() -> None:
    rotary = PackedRotaryEmbedding(head_dim=4, theta=100.0)
    packed = pack(boundaries([2, 1]), 2, torch.tensor([0, 3, 7]))
    angles = rotary(rotary.get_rotary_seq_len(None, None, None, None, packed))
    assert angles.shape == (3, 1, 1, 4)
    # 100 ** -(0/4) = 1 and 100 ** -(2/4) = 0.1
    torch.testing.assert_close(angles[:, 0, 0], torch.tensor([[0, 0, 0, 0], [3, 0.3, 3, 0.3], [7, 0.7, 7, 0.7]]))


def test_rotary_survives_casting_the_model() -> None:
    rotary = PackedRotaryEmbedding(head_dim=64, theta=1e6).bfloat16()
    assert rotary(torch.tensor([1001])).dtype == torch.float32
    assert rotary(torch.tensor([1001]))[0, 0, 0, 0] == 1001  # bfloat16 would say 1000
