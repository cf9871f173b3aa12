"""Weight tables against independent formulas, for every rank of a layout, without processes: models are faked by name.

The fake knows what a GPTModel's state dict looks like under both layer specs; tests/dist/test_bridge.py has real ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasapo.config import ConfigError
from megasapo.families import family
from megasapo.families.weights import BridgeError, Dims, Piece, Shard, columns, gate_up, qkv, rows, vocab
from megasapo.mcore.bridge.export import _combine, _offers, _part
from megasapo.mcore.bridge.placement import find_hf, place
from tests.unit.bridge_fakes import HF_MOE, fake_model, fill_from


def shards_of(layout: Any, full: torch.Tensor, sources: list[torch.Tensor], size: int, dims: Dims) -> None:
    """Each rank's shard of `full` (cut along dim 0) must be what `layout` makes of the HF tensors `sources`."""
    assert full.shape[0] % size == 0
    covered = [torch.zeros(s.shape) for s in sources]
    for rank, expected in enumerate(full.chunk(size)):
        mapped = layout(tuple(expected.shape), Shard(rank, size), dims)
        assert [tuple(s.shape) for s in sources] == list(mapped.shapes)
        got = torch.full_like(expected, -1)
        for piece in mapped.pieces:
            hf = tuple(slice(*bounds) for bounds in piece.hf)
            got[tuple(slice(*bounds) for bounds in piece.local)] = sources[piece.source][hf]
            covered[piece.source][hf] += 1
        assert torch.equal(got, expected), f"rank {rank} of {size}"
    assert all((c == 1).all() for c in covered), "some rows are held twice or never"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (16, 2), (8, 1)])
@pytest.mark.parametrize("width", [None, 3])
def test_qkv_interleaves_by_kv_group(size: int, heads: int, kv_heads: int, width: int | None) -> None:
    head = 4
    tail = () if width is None else (width,)
    if kv_heads * (heads // kv_heads + 2) * head % size:
        pytest.skip("megatron-core refuses to cut these rows evenly too")
    q, k, v = (torch.randn(n * head, *tail) for n in (heads, kv_heads, kv_heads))
    grouped = [t.view(kv_heads, -1, *tail) for t in (q, k, v)]
    full = torch.cat(grouped, dim=1).reshape(-1, *tail)
    shards_of(qkv, full, [q, k, v], size, Dims(99, heads, kv_heads))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_up_puts_each_ranks_gate_before_its_up(size: int) -> None:
    gate, up = torch.randn(8, 3), torch.randn(8, 3)
    full = torch.cat([torch.cat(pair) for pair in zip(gate.chunk(size), up.chunk(size), strict=True)])
    shards_of(gate_up, full, [gate, up], size, Dims(99, 1, 1))


def test_rows_and_columns() -> None:
    assert rows((4, 6), Shard(1, 3), Dims(9, 1, 1)).pieces == (Piece(0, ((4, 8), (0, 6)), ((0, 4), (0, 6))),)
    assert rows((4,), Shard(1, 3), Dims(9, 1, 1)).shapes == ((12,),)
    assert columns((4, 6), Shard(2, 3), Dims(9, 1, 1)).pieces == (Piece(0, ((0, 4), (12, 18)), ((0, 4), (0, 6))),)
    assert columns((4, 6), Shard(2, 3), Dims(9, 1, 1)).shapes == ((4, 18),)


def test_vocab_padding_belongs_to_no_hf_row() -> None:
    dims = Dims(vocab_size=9, num_heads=1, num_kv_heads=1)
    held = [vocab((4, 2), Shard(rank, 4), dims) for rank in range(4)]  # 16 rows for 9
    assert [m.shapes for m in held] == [((9, 2),)] * 4
    assert [m.pieces[0].hf[0] if m.pieces else None for m in held] == [(0, 4), (4, 8), (8, 9), None]
    assert held[2].pieces[0].local[0] == (0, 1)


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_rank_together_makes_up_the_hf_model(spec: str, tp: int, pp: int, ep: int, tied: bool) -> None:
    """Under the local and the TE names: filled from HF tensors, all ranks' offers cover each of them once, equal."""
    hf: dict[str, torch.Tensor] = {}
    gathered, sends = [], []
    for pp_rank in range(pp):
        for rank in range(max(tp, ep)):  # a stage's ranks: tp and ep cut the same ones
            model = fake_model(spec, tp=(rank % tp, tp), pp=(pp_rank, pp), ep=(rank % ep, ep), tied=tied)
            mine = place([model], HF_MOE)
            fill_from(mine, hf)
            offers, views = _offers(mine)
            gathered.append(offers)
            sends.append(views)
    tensors, sources = _combine(gathered)
    assert len(tensors) == len(hf) == (1 if tied else 2) + 1 + 8 * 4 + 3 + (1 + 3 * 4) * 3
    for name, shape, dtype in tensors:
        full = torch.full(shape, float("nan"), dtype=dtype)
        assert sources[name] == [(r, piece.hf) for r, held in enumerate(sends) for _, piece in held.get(name, [])]
        for held in sends:
            for tensor, piece in held.get(name, []):
                full[tuple(slice(*bounds) for bounds in piece.hf)] = _part(tensor, piece)
        assert torch.equal(full, hf[name]), name


def test_order_is_that_of_an_hf_state_dict() -> None:
    mine = place([fake_model("local")], HF_MOE)
    tensors, _ = _combine([_offers(mine)[0]])
    names = [t.name for t in tensors]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(n.split(".")[2]) for n in names if ".layers." in n]
    assert layers == sorted(layers)
    experts = [int(n.split(".")[5]) for n in names if n.startswith("model.layers.1.mlp.experts.")]
    assert experts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_unknown_model_type_names_the_nearest_and_all_known() -> None:
    with pytest.raises(ConfigError, match=r"'qwen3_mo' is not supported \(the nearest is 'qwen3_moe'\); supported: qw"):
        family("qwen3_mo")
    with pytest.raises(ConfigError, match=r"config.json: model_type='llama' is not supported; supported: qwen3_moe, q"):
        family("llama")


def test_parameter_without_a_rule_is_named_with_the_nearest() -> None:
    model = fake_model("local")
    model.tensors["decoder.layers.2.self_attention.linear_qkv.bias"] = torch.zeros(4)
    with pytest.raises(
        BridgeError, match=r"layers\.2\.self_attention\.linear_qkv\.bias'.*self_attention\.linear_qkv\.w"
    ):
        place([model], HF_MOE)


def test_settings_that_reorder_rows_are_refused() -> None:
    model = fake_model("local")
    model.config.moe_mlp_glu_interleave_size = 32
    with pytest.raises(BridgeError, match="moe_mlp_glu_interleave_size=32"):
        place([model], HF_MOE)


def test_configuration_without_vocab_size_is_refused() -> None:
    with pytest.raises(BridgeError, match="no 'vocab_size'; it has model_type"):
        place([fake_model("local")], {"model_type": "qwen3_moe"})


def test_wrapped_models_are_seen_through() -> None:
    wrapped = SimpleNamespace(module=SimpleNamespace(module=fake_model("local")))
    assert [p.mcore_name for p in place([wrapped], HF_MOE).placed] == list(fake_model("local").tensors)  # type: ignore[list-item]


def test_hf_names_are_found_exactly() -> None:
    table = family("qwen3_moe").weights
    rule, layer, expert = find_hf(table, "model.layers.12.mlp.experts.127.down_proj.weight")  # type: ignore[misc]
    assert (rule.layout, layer, expert) == (columns, 12, 127)
    assert find_hf(table, "model.layers.12.mlp.experts.127.down_proj.weight_scale") is None
    assert find_hf(table, "xmodel.norm.weight") is None


def test_incomplete_or_doubled_offers_are_refused() -> None:
    offers, _ = _offers(place([fake_model("local")], HF_MOE))
    with pytest.raises(BridgeError, match=r"embed_tokens\.weight: the ranks' parts .* do not make up"):
        _combine([offers, offers])
    half, _ = _offers(place([fake_model("local", tp=(0, 2))], HF_MOE))
    with pytest.raises(BridgeError, match=r"do not make up"):
        _combine([half])
