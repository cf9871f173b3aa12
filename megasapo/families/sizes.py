"""The sizes of a model and what follows from them, parameters and FLOPs exactly; and the fields they are read from.

Families make a Geometry of a config.json's Fields; megasapo.geometry is how the rest of the program gets one. It knows
nothing of parallelism, and imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megasapo.config import ConfigError

BACKWARD = 2  # a matrix product's backward is two of the same size: by its input and by its weight


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters by what they are; `head` is 0 when it is the embedding (tied)."""

    embedding: int
    head: int
    dense: int  # of all layers and the final norm, without routed experts
    experts: int  # routed experts of all layers
    active: int  # that one token passes: all but the experts it is not routed to

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.dense + self.experts


@dataclass(frozen=True, slots=True)
class Latent:
    """Sizes of latent attention: queries, and keys with values, are made from vectors of low rank."""

    q_rank: int  # 0: queries are projected straight
    kv_rank: int
    plain: int  # of a query's and a key's head: values that are not rotated
    rotated: int  # and those that are; the key's are the same for all heads
    value: int  # of a value's head


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a decoder with gated feed-forward layers and grouped-query or latent attention, all of it causal."""

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    moe_layers: tuple[bool, ...]  # of each layer: whether it has experts
    ffn: int  # width of a dense layer's feed-forward part
    experts: int = 0  # of a layer
    top_k: int = 0
    moe_ffn: int = 0  # width of one expert
    shared_ffn: int = 0  # width of the shared expert, 0 without one
    shared_gate: bool = False  # whether the shared expert's output is weighted by a gate
    qk_norm: bool = True
    qkv_bias: bool = False
    latent: Latent | None = None
    biases: bool = False  # whether the output projection, routers and experts have them, too
    sinks: bool = False  # whether attention has one for each head
    windows: tuple[int, ...] = ()  # of each layer: how many keys a token sees at most, 0: all; () is 0 in every layer

    @property
    def layers(self) -> int:
        return len(self.moe_layers)

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def output_width(self) -> int:
        """Of what attention gives."""
        return self.heads * (self.latent.value if self.latent else self.head_dim)

    @property
    def kv_width(self) -> int:
        """Of keys and values together."""
        if self.latent:
            return self.query_width + self.output_width
        return 2 * self.kv_heads * self.head_dim

    @property
    def attention_input(self) -> int:
        """Width of what tensor-parallel ranks gather of each token for attention's projections that they cut."""
        if self.latent is None:
            return self.hidden
        return (self.latent.q_rank or self.hidden) + self.latent.kv_rank + self.latent.rotated

    @property
    def attention_whole(self) -> int:
        """Weights of one layer's attention that every tensor-parallel rank holds: projections to latents."""
        if self.latent is None:
            return 0
        return self.hidden * (self.latent.q_rank + self.latent.kv_rank + self.latent.rotated)

    @property
    def attention_matrix(self) -> int:
        """Weights of one layer's query, key, value and output projections."""
        if self.latent is None:
            return self.hidden * (2 * self.query_width + self.kv_width)
        queries = (self.latent.q_rank or self.hidden) * self.query_width
        keys = self.latent.kv_rank * self.heads * (self.latent.plain + self.latent.value)
        return self.attention_whole + queries + keys + self.hidden * self.output_width

    @property
    def attention_bias(self) -> int:
        """Biases of one layer's query, key and value projections."""
        return self.query_width + self.kv_width if self.qkv_bias else 0

    @property
    def attention_vectors(self) -> int:
        """One layer's biases of the output projection, and sinks."""
        return self.hidden * self.biases + self.heads * self.sinks

    @property
    def layer_vectors(self) -> int:
        """Norm weights of one layer."""
        if self.latent:
            return 2 * self.hidden + self.latent.q_rank + self.latent.kv_rank
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def dense_mlp(self) -> int:
        return 3 * self.hidden * self.ffn

    @property
    def expert(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden * self.moe_ffn

    @property
    def expert_bias(self) -> int:
        """Biases of one routed expert's products."""
        return (2 * self.moe_ffn + self.hidden) * self.biases

    @property
    def router_bias(self) -> int:
        return self.experts * self.biases

    @property
    def router(self) -> int:
        """Weights of one layer's gates: the router's, and the shared expert's where it has one."""
        return self.hidden * (self.experts + self.shared_gate)

    @property
    def shared_expert(self) -> int:
        return 3 * self.hidden * self.shared_ffn

    def parameters(self) -> Parameters:
        """Exact counts, without vocabulary padding; equal to what transformers builds from the same config."""
        moe = sum(self.moe_layers)
        vectors = self.attention_bias + self.attention_vectors + self.layer_vectors
        dense = self.layers * (self.attention_matrix + vectors) + self.hidden
        dense += (self.layers - moe) * self.dense_mlp + moe * (self.router + self.router_bias + self.shared_expert)
        expert = self.expert + self.expert_bias
        experts = moe * self.experts * expert
        table = self.vocab * self.hidden
        head = 0 if self.tied else table
        return Parameters(table, head, dense, experts, table + head + dense + moe * self.top_k * expert)

    def linear_flops(self, *, with_head: bool = True) -> int:
        """FLOPs of one token's forward pass in products with weights; embedding look-ups and norms cost none."""
        moe = sum(self.moe_layers)
        weights = self.layers * self.attention_matrix + (self.layers - moe) * self.dense_mlp
        weights += moe * (self.router + self.shared_expert + self.top_k * self.expert)
        return 2 * (weights + (self.vocab * self.hidden if with_head else 0))

    @property
    def pair_flops(self) -> int:
        """FLOPs of the forward pass for one query and one key that it attends to, over all layers."""
        return self.layers * 2 * (self.query_width + self.output_width)  # a product with the key, one with the value

    def attention_flops(self, lengths: Iterable[int]) -> int:
        """FLOPs of the forward pass in causal attention: token t of a sequence attends to t keys, its own included.

        In layers with a window, to that many at most.
        """
        lengths, windows = list(lengths), self.windows or (0,) * self.layers
        pairs = {window: sum(_causal_pairs(n, window) for n in lengths) for window in set(windows)}
        return sum(pairs[window] for window in windows) * (self.pair_flops // self.layers)

    def forward_flops(self, lengths: Iterable[int], head_tokens: int | None = None) -> int:
        """FLOPs of one forward pass over sequences of these lengths: matrix products only.

        `head_tokens`: how many of the tokens need a logprob and so the output head; all without it.
        """
        lengths = list(lengths)
        flops = sum(lengths) * self.linear_flops() + self.attention_flops(lengths)
        without = 0 if head_tokens is None else sum(lengths) - head_tokens
        return flops - without * 2 * self.vocab * self.hidden

    def training_flops(self, lengths: Iterable[int], head_tokens: int | None = None) -> int:
        """Forward and backward, without what recomputation adds: the figure of model FLOPs utilisation."""
        return (1 + BACKWARD) * self.forward_flops(lengths, head_tokens)

    @property
    def cost_ratio(self) -> float:
        """b / a of a sequence's cost a n + b n^2: what data.balance needs to level attention along with the rest."""
        layer = self.pair_flops / self.layers
        seen = sum(self.windows)  # far from the start of a sequence, which is all that counts here
        full = self.layers - sum(window > 0 for window in self.windows)
        return full * layer / 2 / (self.linear_flops() + full * layer / 2 + seen * layer)


def _causal_pairs(length: int, window: int) -> int:
    if not window or length <= window:
        return length * (length + 1) // 2
    return length * window - window * (window - 1) // 2


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a config.json, checked as they are read."""

    config: Mapping[str, Any]
    source: str

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of `names` (spellings of one field) that is set: a positive whole number."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{self.source}: {name}={value!r} is not a positive whole number")
            return value
        if default is None:
            raise ConfigError(f"{self.source}: {names[0]} is missing")
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {name}={value!r} is neither true nor false")
        return value
