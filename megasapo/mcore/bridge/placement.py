"""Where every local tensor of a model belongs in HF terms: which tensors, their full shapes, which boxes of them.

Reads the GPTModel chunks of this rank and the family's table; load.py and export.py copy along the result.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from megasapo.families import family
from megasapo.families.mtp import mtp_layers
from megasapo.families.weights import (
    EMBEDDING_NAME,
    HEAD_NAME,
    BridgeError,
    Dims,
    Mapped,
    Piece,
    Rule,
    Shape,
    Shard,
    WeightTable,
    full_box,
    index_of,
    pattern,
)
from megasapo.mcore.model import unwrapped

SHUFFLING_SETTINGS = ("moe_mlp_glu_interleave_size", "attention_output_gate")
"""TransformerConfig fields that change the order of rows inside a weight; no table knows them yet."""


AFTER_ALL = 3  # in Placed.order, where _section gives the first number


class Placed(NamedTuple):
    """One local tensor. `names` and `shapes` are those of its full HF tensors, `pieces` index into them."""

    mcore_name: str
    tensor: torch.Tensor
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    pieces: tuple[Piece, ...]
    order: tuple[int, ...]  # sorts tensors as an HF state dict lists them: embedding, layers, experts, head
    is_primary: bool  # among the ranks that hold equal copies, this one speaks for them
    keeps_dtype: bool  # see Rule


class Locals(NamedTuple):
    """What this rank holds of a model: its tensors, and the indices by which HF names tell whose they are."""

    table: WeightTable
    placed: list[Placed]
    layers: frozenset[int]  # global indices
    experts: frozenset[int]
    num_layers: int  # of the whole model
    mtp_layers: range  # that files may have after these, for multi-token prediction, and that are not loaded
    num_experts: int
    is_tied: bool


class Ranks(NamedTuple):
    """This rank's place in the groups that a model was built with."""

    dense: Shard
    expert: Shard
    ep: Shard
    is_first_dense_replica: bool
    is_first_expert_replica: bool


def settings(hf_config: Any) -> Mapping[str, Any]:
    """A transformers configuration, or the contents of config.json, as a mapping."""
    return hf_config if isinstance(hf_config, Mapping) else cast(Mapping[str, Any], hf_config.to_dict())


def place(chunks: Sequence[nn.Module], hf_config: Any) -> Locals:
    """This rank's tensors. `chunks` may be wrapped (DDP, Float16Module).

    Raises BridgeError for a tensor without a rule or a setting that no table covers, ConfigError for an unknown family.
    """
    models = [unwrapped(chunk) for chunk in chunks]
    config: Any = models[0].config
    for name in SHUFFLING_SETTINGS:
        if getattr(config, name, None):
            raise BridgeError(
                f"{name}={getattr(config, name)} reorders weights in a way no weight table knows: unset it"
            )
    hf = settings(hf_config)
    for name in ("model_type", "vocab_size"):
        if name not in hf:
            raise BridgeError(f"the model's HF configuration has no {name!r}; it has {', '.join(sorted(hf))}")
    table = family(hf["model_type"]).weights
    is_tied = bool(models[0].share_embeddings_and_output_weights)
    ranks = _ranks(models[0])
    num_experts = config.num_moe_experts or 0
    per_rank = num_experts // ranks.ep.size
    dims = Dims(hf["vocab_size"], config.num_attention_heads, config.num_query_groups, num_experts)
    layers = frozenset(layer.layer_number - 1 for model in models for layer in model.decoder.layers)
    first_expert = ranks.ep.rank * per_rank
    placed = [
        _place(name, tensor, model, table, dims, ranks, first_expert, is_tied)
        for model in models
        for name, tensor in _tensors(model)
    ]
    experts = frozenset(range(first_expert, first_expert + per_rank))
    return Locals(table, placed, layers, experts, config.num_layers, mtp_layers(hf), num_experts, is_tied)


def find_hf(table: WeightTable, name: str) -> tuple[Rule, int | None, int | None] | None:
    """The rule, global layer and global expert of an HF name; None when no rule claims it."""
    for rule in table.rules:
        for template in rule.hf:
            if match := pattern(template).fullmatch(name):
                return rule, index_of(match, "layer"), index_of(match, "expert")
    return None


def keeps_dtype(hf_config: Mapping[str, Any], name: str) -> bool:
    """Whether the tensor of an HF name is not cast with the others: see Rule."""
    found = find_hf(family(hf_config.get("model_type")).weights, name)
    return found is not None and found[0].keeps_dtype


def as_it_is(name: str, shape: Shape, hf_config: Mapping[str, Any]) -> Placed:
    """An HF tensor that no parameter of the model is made of, as one that is it, on the meta device."""
    box = full_box(shape)
    tensor = torch.empty(shape, device="meta")
    keeps = keeps_dtype(hf_config, name)
    return Placed(name, tensor, (name,), (shape,), (Piece(0, box, box),), (AFTER_ALL,), True, keeps)


def nearest(name: str, candidates: Sequence[str]) -> str:
    """A phrase for error messages: the names most like `name`."""
    close = difflib.get_close_matches(name, candidates, n=3)
    return f"nearest: {', '.join(close)}" if close else "nothing of a similar name"


def _ranks(model: Any) -> Ranks:
    groups = model.pg_collection
    return Ranks(
        Shard(groups.tp.rank(), groups.tp.size()),
        Shard(groups.expt_tp.rank(), groups.expt_tp.size()),
        Shard(groups.ep.rank(), groups.ep.size()),
        groups.dp_cp.rank() == 0,
        groups.expt_dp.rank() == 0,
    )


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers; Transformer Engine's `_extra_state` is no weight."""
    for name, value in model.state_dict(keep_vars=True).items():
        if value is not None and not name.endswith("_extra_state"):
            yield name, value


def _find_mcore(table: WeightTable, name: str) -> tuple[int, re.Match[str]]:
    for position, rule in enumerate(table.rules):
        for template in rule.mcore:
            if match := pattern(template).fullmatch(name):
                return position, match
    templates = [t for rule in table.rules for t in rule.mcore]
    generic = re.sub(r"(?<=layers\.)\d+", "{layer}", name)
    raise BridgeError(f"no rule of the weight table covers the parameter {name!r} ({nearest(generic, templates)})")


def _place(
    name: str,
    tensor: torch.Tensor,
    model: Any,
    table: WeightTable,
    dims: Dims,
    ranks: Ranks,
    first_expert: int,
    is_tied: bool,
) -> Placed:
    position, match = _find_mcore(table, name)
    rule = table.rules[position]
    index: dict[str, int] = {}
    if (local_layer := index_of(match, "layer")) is not None:
        index["layer"] = model.decoder.layers[local_layer].layer_number - 1
    if (local_expert := index_of(match, "expert")) is not None:
        index["expert"] = first_expert + local_expert
    names = tuple(template.format(**index) for template in rule.hf)
    is_copy = is_tied and names == (HEAD_NAME,)
    if is_copy:
        names = (EMBEDDING_NAME,)
    dims = dims._replace(expert=index.get("expert", 0))
    mapped = rule.layout(tuple(tensor.shape), ranks.expert if rule.is_expert else ranks.dense, dims)
    is_primary = not is_copy and _is_primary(rule, mapped, ranks, dims, tuple(tensor.shape))
    expert = index.get("expert", -1) if any("{expert}" in template for template in rule.hf) else -1
    order = (_section(table, position), index.get("layer", -1), expert, position)
    return Placed(name, tensor, names, *mapped, order, is_primary, rule.keeps_dtype)


def _section(table: WeightTable, position: int) -> int:
    """0 before the layers, 1 in them, 2 after them."""
    if table.rules[position].is_layer:
        return 1
    return 2 if any(rule.is_layer for rule in table.rules[:position]) else 0


def _is_primary(rule: Rule, mapped: Mapped, ranks: Ranks, dims: Dims, local: Shape) -> bool:
    if not (ranks.is_first_expert_replica if rule.is_expert else ranks.is_first_dense_replica):
        return False
    shard = ranks.expert if rule.is_expert else ranks.dense
    return shard.rank == 0 or mapped.pieces != rule.layout(local, Shard(0, shard.size), dims).pieces


def as_stored(part: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A view of a piece's part of the local tensor whose elements come in the order in which the HF tensor has them."""
    if not piece.turns:
        return part
    turning = part.unflatten(0, (piece.turns, -1))
    return turning.permute(*reversed(range(turning.dim())))
