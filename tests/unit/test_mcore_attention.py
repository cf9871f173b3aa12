"""Packed attention and rotary embedding against formulas in fp64, on plans of every shape."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megasapo.data.packing import Shard
from megasapo.families.family import Rotary
from megasapo.mcore.attention import PackedAttention, pack, plan

HEADS, GROUPS, DIM, THETA = 4, 2, 8, 100.0
PACKS = [[1], [7], [1, 1, 1], [3, 30, 5, 17, 1, 64, 2], [40] * 5, [2, 4, 8, 16], [5, 0, 3]]


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def packed(lengths: list[int], **over):
    return pack(boundaries(lengths), max(lengths), positions(lengths), **{"rotary": Rotary(THETA, DIM)} | over)


def config(**over) -> SimpleNamespace:
    fields = {"attention_dropout": 0.0, "window_size": None, "window_attn_skip_freq": None, "softmax_type": "vanilla"}
    return SimpleNamespace(**fields | over)


def attention(**over) -> PackedAttention:
    return PackedAttention(config(), **over)


def sliding(window: int, sinks: torch.Tensor | None = None, layer_number: int = 1) -> PackedAttention:
    """Of a model whose odd layers have a window."""
    made = PackedAttention(config(window_size=(window - 1, 0), window_attn_skip_freq=[1, 0]), layer_number)
    if sinks is not None:
        made.softmax_offset = torch.nn.Parameter(sinks)
    return made


def inputs(num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, GROUPS, GROUPS)
    return [torch.randn(num_tokens, h, DIM, generator=generator, dtype=torch.float64).to(dtype) for h in heads]


def by_formula(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k / sqrt d) v of each token over its sequence's past, one head at a time, in fp64, q and k rotated.

    With a window, over that many tokens at most; with sinks, of which one more logit a head takes a share.
    """
    q, k, v = (x.double() for x in (q, k, v))
    q, k = (rotated(x, lengths) for x in (q, k))
    out = torch.zeros_like(q)
    start = 0
    for n in lengths:
        for t in range(start, start + n):
            for h in range(HEADS):
                g = h * GROUPS // HEADS
                first = max(start, t + 1 - window) if window else start
                weights = (k[first : t + 1, g] @ q[t, h] * scale).exp()
                total = weights.sum() + (0 if sinks is None else sinks[h].exp())
                out[t, h] = weights / total @ v[first : t + 1, g]
        start += n
    return out.flatten(1)


def rotated(x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Each pair (x_i, x_{i+d/2}) turned by position * theta^(-2i/d), as complex numbers; cosines in fp32."""
    dim = x.shape[-1]
    inverse = 1.0 / THETA ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = positions(lengths).float()[:, None] * inverse
    turn = torch.complex(angles.cos().double(), angles.sin().double())
    turned = torch.complex(*x.chunk(2, dim=-1)) * turn[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_packed_attention_is_the_formula(lengths: list[int]) -> None:
    q, k, v = inputs(sum(lengths), torch.float64)
    out = attention()(q, k, v, packed_seq_params=packed(lengths))
    torch.testing.assert_close(out, by_formula(q, k, v, lengths, DIM**-0.5), rtol=0, atol=1e-12)


def test_only_the_first_values_of_a_head_are_rotated_where_there_are_fewer_angles() -> None:
    lengths, part = [5, 3], DIM // 2
    q, k, v = inputs(8, torch.float64)
    out = attention()(q, k, v, packed_seq_params=packed(lengths, rotary=Rotary(THETA, part)))
    q, k = (torch.cat((rotated(x[..., :part], lengths), x[..., part:]), -1) for x in (q, k))
    still = packed(lengths, rotary=Rotary(THETA, 0))
    torch.testing.assert_close(out, attention()(q, k, v, packed_seq_params=still), rtol=0, atol=1e-12)


def test_softmax_scale_is_used() -> None:
    q, k, v = inputs(5, torch.float64)
    out = attention(softmax_scale=0.1)(q, k, v, packed_seq_params=packed([5]))
    torch.testing.assert_close(out, by_formula(q, k, v, [5], 0.1), rtol=0, atol=1e-12)


def test_bfloat16_is_near_the_formula() -> None:
    lengths = [9, 3, 20]
    q, k, v = inputs(sum(lengths), torch.bfloat16)
    out = attention()(q, k, v, packed_seq_params=packed(lengths))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), by_formula(q, k, v, lengths, DIM**-0.5), rtol=0, atol=0.03)


def test_gradients_are_the_formulas() -> None:
    lengths = [5, 1, 12, 3]
    leaves = [x.requires_grad_() for x in inputs(sum(lengths), torch.float64)]
    seed = torch.randn(sum(lengths), HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    params = packed(lengths)
    got = torch.autograd.grad((attention()(*leaves, packed_seq_params=params) * seed).sum(), leaves)
    want = torch.autograd.grad((by_formula(*leaves, lengths, DIM**-0.5) * seed).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 4, 9, 1000])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_sliding_windows_are_the_formula(lengths: list[int], window: int) -> None:
    q, k, v = inputs(sum(lengths), torch.float64)
    params = packed(lengths, window=window)
    out = sliding(window)(q, k, v, packed_seq_params=params)
    torch.testing.assert_close(out, by_formula(q, k, v, lengths, DIM**-0.5, window), rtol=0, atol=1e-12)
    out = sliding(window, layer_number=2)(q, k, v, packed_seq_params=params)
    torch.testing.assert_close(out, by_formula(q, k, v, lengths, DIM**-0.5), rtol=0, atol=1e-12)


def test_a_window_costs_no_more_than_twice_its_keys() -> None:
    layout = plan(boundaries([1000, 37]), window=16)
    assert sum(len(bucket.queries) * len(bucket.keys) // bucket.num for bucket in layout.buckets) < 1100 * 31


@pytest.mark.parametrize("layer_number", [1, 2])
def test_gradients_with_sinks_are_the_formulas(layer_number: int) -> None:
    lengths, window = [5, 1, 12, 3], 4
    sinks = torch.tensor([0.7, -2.0, 3.0, 0.0], dtype=torch.float64)
    module = sliding(window, sinks, layer_number)
    leaves = [x.requires_grad_() for x in inputs(sum(lengths), torch.float64)]
    seed = torch.randn(sum(lengths), HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = module(*leaves, packed_seq_params=packed(lengths, window=window))
    got = torch.autograd.grad((out * seed).sum(), [*leaves, module.softmax_offset])
    sinks.requires_grad_()
    expected = by_formula(*leaves, lengths, DIM**-0.5, window if layer_number == 1 else None, sinks)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for a, b in zip(got, torch.autograd.grad((expected * seed).sum(), [*leaves, sinks]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_scaled_frequencies_are_used() -> None:
    params = packed([3], rotary=Rotary(THETA, 4, scaled=lambda device: (torch.tensor([0.5, 0.25], device=device), 2.0)))
    torch.testing.assert_close(params.cos[2, 0], 2 * torch.tensor([1.0, 0.5, 1.0, 0.5]).cos())


def test_plan_wastes_less_than_half_and_loses_no_token() -> None:
    lengths = [1, 100, 3, 7, 8, 9, 50, 51, 2]
    layout = plan(boundaries(lengths))
    slots = sum(len(bucket.queries) for bucket in layout.buckets)
    assert slots < 2 * sum(lengths)
    rows = torch.cat([bucket.queries for bucket in layout.buckets])
    torch.testing.assert_close(rows[layout.inverse], torch.arange(sum(lengths)))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_context_parallel_queries_see_their_past_on_all_ranks(cp: int, window: int | None) -> None:
    lengths = [2 * cp * n for n in (1, 7, 2, 3)]
    total = sum(lengths)
    q, k, v = inputs(total, torch.float64)
    want = by_formula(q, k, v, lengths, DIM**-0.5, window)
    bounds = boundaries(lengths).numpy()
    held = [torch.from_numpy(Shard(cp, rank).context_slots(bounds)) for rank in range(cp)]
    gathered = torch.cat(held)
    k_rotated = rotated(k, lengths)
    for rank in range(cp):
        layout = plan(boundaries(lengths), Shard(cp, rank), window)
        own_q, all_k, all_v = rotated(q, lengths)[held[rank]], k_rotated[gathered], v[gathered]
        parts = []
        for bucket in layout.buckets:
            one = [
                x.index_select(0, rows).unflatten(0, (bucket.num, -1)).transpose(1, 2)
                for x, rows in ((own_q, bucket.queries), (all_k, bucket.keys), (all_v, bucket.keys))
            ]
            parts.append(attention()._attend(*one, bucket.mask).transpose(1, 2).flatten(0, 1).flatten(1))
        out = torch.cat(parts).index_select(0, layout.inverse)
        torch.testing.assert_close(out, want[held[rank]], rtol=0, atol=1e-6)


def test_context_parallel_ranks_see_equally_many_keys() -> None:
    lengths = [8 * n for n in (1, 7, 2, 3)]
    seen = []
    for rank in range(4):
        layout = plan(boundaries(lengths), Shard(4, rank))
        pairs = 0
        for bucket in layout.buckets:
            causal = torch.ones(len(bucket.queries) // bucket.num, len(bucket.keys) // bucket.num).tril().bool()
            masks = causal.expand(bucket.num, -1, -1) if bucket.mask is None else bucket.mask[:, 0]
            for queries, keys, mask in zip(
                bucket.queries.view(bucket.num, -1), bucket.keys.view(bucket.num, -1), masks, strict=True
            ):
                first = torch.cat((torch.tensor([True]), queries.diff() != 0))  # without padding
                real = torch.cat((torch.tensor([True]), keys.diff() != 0))
                pairs += int((mask & first[:, None] & real[None, :]).sum())
        seen.append(pairs)
    assert len(set(seen)) == 1
    assert sum(seen) == sum(n * (n + 1) // 2 for n in lengths)


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_dropout"):
        PackedAttention(config(attention_dropout=0.1))


def test_masks_and_unpacked_batches_are_refused() -> None:
    q, k, v = inputs(4, torch.float64)
    with pytest.raises(ValueError, match="masks"):
        attention()(q, k, v, torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="packed"):
        attention()(q, k, v)


def test_rotary_angles_are_fp32_whatever_the_model_computes_in() -> None:
    params = pack(boundaries([1]), 1, torch.tensor([1001]), rotary=Rotary(1e6, 64))
    assert params.cos.dtype == torch.float32
    torch.testing.assert_close(params.cos[0, 0, 0], torch.tensor(1001.0).cos())  # bfloat16 would say 1000
