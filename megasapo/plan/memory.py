"""Bytes on each GPU: weights, gradients and optimizer state exactly, activations by what layers keep for backward.

Called by timing.py (bytes moved) and search.py (what fits). docs/planner.md has the formulas, tests/dist measures them.
It knows sizes and degrees, no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megasapo.config import Config
from megasapo.geometry import Geometry, Latent
from megasapo.layout import padded_vocab_size
from megasapo.plan.hardware import ASSUMED
from megasapo.plan.work import Degrees, Work

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
CHUNK_BYTES = 2**29  # as mcore/head.py's on CUDA; a test compares


@dataclass(frozen=True, slots=True)
class Held:
    """Numbers of parameters on one rank; `dense` are all but routed experts."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank of a stage at its fullest moment."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    head: int
    routing: int
    reserve: int

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in Memory.__slots__}


def stage_chunks(geometry: Geometry, degrees: Degrees, stage: int) -> list[tuple[bool, ...]]:
    """Of each model chunk of a stage, whether its layers have experts. Chunk c of stage s is number c * pp + s."""
    size = geometry.layers // (degrees.pp * degrees.vpp)
    starts = [(c * degrees.pp + stage) * size for c in range(degrees.vpp)]
    return [geometry.moe_layers[start : start + size] for start in starts]


def layer_counts(geometry: Geometry, degrees: Degrees, stage: int) -> dict[bool, int]:
    """Layers of a stage with experts (True) and without."""
    layers = [moe for chunk in stage_chunks(geometry, degrees, stage) for moe in chunk]
    return {moe: layers.count(moe) for moe in (True, False) if moe in layers}


def held_parameters(geometry: Geometry, degrees: Degrees, stage: int) -> Held:
    """Exact: what one rank of this stage holds, vocabulary padding included, replicated weights counted on each."""
    g, tp = geometry, degrees.tp
    layers = [moe for chunk in stage_chunks(g, degrees, stage) for moe in chunk]
    moe = sum(layers)
    cut, whole = g.attention_matrix - g.attention_whole + g.attention_bias, g.attention_whole + g.layer_vectors
    dense = len(layers) * (cut // tp + g.attention_vectors + whole)
    dense += (len(layers) - moe) * g.dense_mlp // tp + moe * (g.router + g.router_bias + g.shared_expert // tp)
    table = padded_vocab_size(g.vocab, tp) // tp * g.hidden
    first, last = stage == 0, stage == degrees.pp - 1
    dense += table * first + g.hidden * last
    if last and not (first and g.tied):
        dense += table  # tied across stages: both hold it
    return Held(dense, moe * (g.experts // degrees.ep) * (g.expert + g.expert_bias) // degrees.etp)


def parameter_bytes(held: Held, degrees: Degrees, dtype: str) -> tuple[int, int, int]:
    """(weights, gradients, optimizer state) of a rank, exact up to the padding of its buffers.

    Gradients are fp32 and whole; Adam's two moments and, for bf16, the fp32 master weights are sharded over the ranks
    that hold the same parameters: dp * cp for dense ones, edp for experts.
    """
    width = DTYPE_BYTES[dtype]
    state = 8 if width == 4 else 12
    sharded = -(-held.dense // (degrees.dp * degrees.cp)) + -(-held.experts // degrees.edp)
    return held.total * width, held.total * 4, sharded * state


@dataclass(frozen=True, slots=True)
class Kernels:
    """Bytes a token that a layer's implementation keeps for backward; docs/planner.md lists the tensors."""

    fused: bool  # Transformer Engine on a GPU; otherwise our own modules on torch

    def norm(self, width: float, element: int) -> float:
        """Bytes of a norm over `width` values: its input, its output and one fp32 scale."""
        return 2 * width * element + 4

    def attention(self, g: Geometry, cp: int, element: int, *, again: bool) -> float:
        """From projected queries, keys and values to the output projection's input; `again`: the core is recomputed."""
        if g.latent:
            return self.latent_attention(g, g.latent, cp, element, again=again)
        q, kv = g.query_width, g.kv_width
        rotated = q + kv / 2
        kept: float = q + kv + q + q  # what was projected, queries made contiguous, attention's output
        if self.fused:
            kept += rotated + (kv * cp if cp > 1 else 0)
            return kept * element + (0 if again else 4 * g.heads)
        # without a fused kernel keys and values are repeated for every query head, over all tokens that the rank sees
        kept += rotated if again else q + 2 * q * (cp + 0.5 if cp > 1 else 1) + q
        return kept * element + (0 if again else 4 * g.heads)

    def latent_attention(self, g: Geometry, latent: Latent, cp: int, element: int, *, again: bool) -> float:
        """The same from latents on, their norms included; keys and values are those of all heads."""
        q, kv, out = g.query_width, g.kv_width, g.output_width
        norms = sum(self.norm(rank, element) for rank in (latent.q_rank, latent.kv_rank) if rank)
        kept: float = latent.rotated + out
        if self.fused:
            kept += q + kv + (kv * cp if cp > 1 else 0)
        else:  # cosines and sines of both; values have heads as wide as keys' to be attended
            kept += 4 * latent.rotated + (q + kv if again else 2 * q + 2 * q * (cp + 0.5 if cp > 1 else 1))
        return norms + kept * element + (0 if again else 4 * g.heads)

    def mlp(self, width: int, element: int) -> float:
        """A gated feed-forward part without its input."""
        return (3 if self.fused else 5) * width * element

    def experts(self, g: Geometry, etp: int, element: int) -> float:
        """Of a routed token: what `mlp` says and the experts' input; not fused, what a gate multiplied and gave."""
        routed = g.hidden * etp + (3 if self.fused else 6) * g.moe_ffn
        return g.top_k * (routed * element + 4 * 8) + 2 * 4 * g.experts  # indices and gates; router logits


FUSED, PLAIN = Kernels(fused=True), Kernels(fused=False)


def layer_saved_bytes(
    geometry: Geometry,
    degrees: Degrees,
    tokens: float,
    *,
    moe: bool,
    dtype: str,
    recompute: str,
    kernels: Kernels = FUSED,
) -> float:
    """What one layer keeps for backward of one micro-batch of `tokens` (before any cut), on one rank."""
    g, element = geometry, DTYPE_BYTES[dtype]
    own = tokens / (degrees.tp * degrees.cp)  # tokens of this rank between layers
    if recompute == "full":
        return own * g.hidden * element
    kept = 2 * kernels.norm(g.hidden, element)
    kept += kernels.attention(g, degrees.cp, element, again=recompute == "selective")
    kept += kernels.mlp(g.shared_ffn if moe else g.ffn, element)
    kept += kernels.experts(g, degrees.etp, element) if moe else 0
    return own * kept


def in_flight(degrees: Degrees, stage: int, micro_batches: int) -> float:
    """Micro-batches, each of all layers of the stage, whose activations a stage holds at its fullest moment.

    1F1B: one for each stage from here to the end; interleaved: chunks of the next rounds too.
    """
    if degrees.pp == 1:
        return 1
    if degrees.vpp == 1:
        return min(micro_batches, degrees.pp - stage)
    chunks = 2 * (degrees.pp - stage - 1) + (degrees.vpp - 1) * degrees.pp + 1
    return min(micro_batches * degrees.vpp, chunks) / degrees.vpp


def kept_bytes(
    geometry: Geometry,
    degrees: Degrees,
    work: Work,
    stage: int,
    *,
    dtype: str,
    recompute: str,
    kernels: Kernels = FUSED,
) -> float:
    """What all layers of a stage keep for backward when it is most: micro-batches in flight, and what is recomputed."""
    counts = layer_counts(geometry, degrees, stage)

    def saved(moe: bool, how: str) -> float:
        return layer_saved_bytes(
            geometry, degrees, work.micro_tokens, moe=moe, dtype=dtype, recompute=how, kernels=kernels
        )

    kept = sum(count * saved(moe, recompute) for moe, count in counts.items())
    kept *= in_flight(degrees, stage, work.micro_batches)
    last = 0.0
    if stage == degrees.pp - 1:
        last = work.micro_tokens / (degrees.tp * degrees.cp) * kernels.norm(geometry.hidden, DTYPE_BYTES[dtype])
    if recompute == "full":  # the final norm is done with before the first layer is computed again
        return kept + max(last, *(saved(moe, "none") for moe in counts))
    return kept + last


def activation_bytes(
    geometry: Geometry, degrees: Degrees, work: Work, stage: int, *, dtype: str, recompute: str
) -> float:
    """Kept for backward, and the gradients of the layer that backward is at: about as much as that layer keeps."""
    kept = kept_bytes(geometry, degrees, work, stage, dtype=dtype, recompute=recompute)
    tokens, kinds = work.micro_tokens, layer_counts(geometry, degrees, stage)
    working = max(layer_saved_bytes(geometry, degrees, tokens, moe=moe, dtype=dtype, recompute="none") for moe in kinds)
    return (kept + working) * ASSUMED.fragmentation


def head_bytes(geometry: Geometry, degrees: Degrees, tokens: int, dtype: str) -> float:
    """The fused head with its Triton kernels: a chunk of logits, hidden states of all tp ranks, sums of each token."""
    width = DTYPE_BYTES[dtype]
    columns = padded_vocab_size(geometry.vocab, degrees.tp) // degrees.tp
    replica = tokens / degrees.cp
    logits = min(CHUNK_BYTES, replica * columns * width)
    gathered = 2 * replica * geometry.hidden * width  # the states and their gradient
    return logits + gathered + 8 * 4 * replica


def routing_bytes(geometry: Geometry, degrees: Degrees, work: Work, stage: int) -> float:
    """R2's record: every own token's experts in every own layer, for all micro-batches of a rollout batch."""
    layers = sum(sum(chunk) for chunk in stage_chunks(geometry, degrees, stage))
    width = 1 if geometry.experts <= 256 else 2
    tokens = work.micro_tokens * work.micro_batches * work.mini_batches / (degrees.tp * degrees.cp)
    return tokens * layers * geometry.top_k * width


def stage_memory(cfg: Config, geometry: Geometry, degrees: Degrees, work: Work, stage: int, recompute: str) -> Memory:
    """All of it, for one rank of one stage."""
    dtype = cfg.model.dtype
    weights, gradients, optimizer = parameter_bytes(held_parameters(geometry, degrees, stage), degrees, dtype)
    activations = activation_bytes(geometry, degrees, work, stage, dtype=dtype, recompute=recompute)
    head = head_bytes(geometry, degrees, work.micro_tokens, dtype) if stage == degrees.pp - 1 else 0
    replay = cfg.algo.routing_replay != "none"
    # the current weights are set aside while the reference pass runs, which in turn keeps no activations
    reference = weights + max(0, weights - round(activations + head)) if cfg.algo.kl_coef else 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        activations=round(activations),
        head=round(head),
        routing=round(routing_bytes(geometry, degrees, work, stage)) if replay else 0,
        reserve=round(ASSUMED.reserve_bytes),
    )


def worst_stage(cfg: Config, geometry: Geometry, degrees: Degrees, work: Work, recompute: str) -> tuple[int, Memory]:
    """The stage whose ranks need the most, and what they need."""
    stages: Mapping[int, Memory] = {
        stage: stage_memory(cfg, geometry, degrees, work, stage, recompute) for stage in range(degrees.pp)
    }
    stage = max(stages, key=lambda s: stages[s].total)
    return stage, stages[stage]
